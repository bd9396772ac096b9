#include "augment.h"

#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// Below this many elements a thread, waking one costs more than it saves.
constexpr int64_t kGrain = 32768;
// So many pixels of an image are mapped before they are copied: the map stays in the first-level cache.
constexpr int kPatch = 1024;

void check_values(const AugmentCall& call, const Optional& index, const Optional& top_left, const Optional& cos_sin) {
  if (index) {
    for (int64_t n = 0; n < call.images; ++n) {
      if (image_of(call, n) >= 0) continue;
      fail(*index, "0 to " + std::to_string(call.stored - 1), std::to_string(call.index[n]));
    }
  }
  for (int64_t i = 0; top_left && i < top_left->numel; ++i) {
    if (call.top_left[i] < 0 || call.top_left[i] > 2 * call.pad) {
      fail(*top_left, "0 to " + std::to_string(2 * call.pad), std::to_string(call.top_left[i]));
    }
  }
  for (int64_t i = 0; cos_sin && i < cos_sin->numel; i += 2) {
    const double c = call.cos_sin[i], s = call.cos_sin[i + 1];
    if (!(std::abs(c * c + s * s - 1) <= kUnitTolerance)) {
      fail(*cos_sin, "cosine and sine of an angle", std::to_string(c) + ", " + std::to_string(s));
    }
  }
}

// n pixels of one row and channel, of which the first stands at x and the next `step` further.
template <typename Out, typename In>
PUAT_SIMD void copy_row(Out* out, const In* x, int n, int64_t step) {
  if (step == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) store(&out[i], value_of(x[i]));
  } else if (step == -1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) store(&out[i], value_of(x[-i]));
  } else {
    for (int i = 0; i < n; ++i) store(&out[i], value_of(x[i * step]));
  }
}

// One image that is not rotated, contiguous: each row is one stretch of a source row, with zeros on both sides.
template <typename Out, typename In>
void copy_rows(const AugmentCall& call, const Transform& t, Out* out, const In* x) {
  const int begin = std::clamp(t.flip ? t.right : -t.right, 0, t.width);
  const int end = std::clamp(t.flip ? t.width + t.right : t.width - t.right, begin, t.width);
  const int64_t step = t.flip ? -call.column_stride : call.column_stride;
  const int64_t first = t.flip ? t.width - 1 - begin + t.right : begin + t.right;
  for (int c = 0; c < call.channels; ++c) {
    for (int i = 0; i < t.height; ++i, out += t.width) {
      const int64_t y = i + t.down;
      const int n = y >= 0 && y < t.height ? end - begin : 0;
      if (n == 0) {
        std::fill_n(out, t.width, Out{});
        continue;
      }
      std::fill(out, out + begin, Out{});
      copy_row(out + begin, x + c * int64_t{call.channel_stride} + y * call.row_stride + first * call.column_stride, n,
               step);
      std::fill(out + end, out + t.width, Out{});
    }
  }
}

// For output pixels [begin, begin + n) of an image, in the order of its rows: where in x the pixels stand that each is
// the sum of, -1 for none. kTerms: 1 forward, where a pixel is a copy, and kTakers backward.
template <int kTerms>
PUAT_SIMD void map_pixels(const AugmentCall& call, const Transform& t, int begin, int n, int (*map)[kPatch]) {
  const auto place = [&](bool is_there, int y, int x) {
    return is_there ? y * call.row_stride + x * call.column_stride : -1;
  };
  for (int done = 0; done < n;) {
    const int y = (begin + done) / t.width, x0 = (begin + done) % t.width, columns = std::min(t.width - x0, n - done);
#pragma omp simd
    for (int i = 0; i < columns; ++i) {
      const int x = x0 + i;
      if (kTerms == 1) {
        const Pixel from = source_of(t, y, x);
        map[0][done + i] = place(from.y >= 0, from.y, from.x);
      } else {
        const Pixel corner = takers_of(t, y, x);
        for (int k = 0; k < kTerms; ++k) {
          const Pixel taker{corner.y + k / 2, corner.x + k % 2};
          map[k][done + i] = place(takes(t, taker, y, x), taker.y, taker.x);
        }
      }
    }
    done += columns;
  }
}

template <int kTerms, typename Out, typename In>
PUAT_SIMD void copy_mapped(const AugmentCall& call, int begin, int n, const int (*map)[kPatch], Out* out, const In* x) {
  const int64_t pixels = int64_t{call.height} * call.width;
  for (int c = 0; c < call.channels; ++c, x += call.channel_stride) {
    Out* to = out + (call.channels_last ? begin * int64_t{call.channels} + c : c * pixels + begin);
    const int step = call.channels_last ? call.channels : 1;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float sum = map[0][i] < 0 ? 0.0f : value_of(x[map[0][i]]);
      for (int k = 1; k < kTerms; ++k) sum += map[k][i] < 0 ? 0.0f : value_of(x[map[k][i]]);
      store(&to[static_cast<int64_t>(i) * step], sum);
    }
  }
}

// Images [begin, end), pixel by pixel. Where they share their draws, they share the map too.
template <int kTerms, typename Out, typename In>
void run_mapped(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  const int pixels = call.height * call.width;
  const int64_t size = int64_t{call.channels} * pixels;
  const int64_t group = call.shares_draws() ? end - begin : 1;
  int map[kTerms][kPatch];
  for (int64_t first = begin; first < end; first += group) {
    const Transform t = transform_of(call, first);
    for (int done = 0; done < pixels; done += kPatch) {
      const int n = std::min(kPatch, pixels - done);
      map_pixels<kTerms>(call, t, done, n, map);
      for (int64_t i = first; i < first + group; ++i) {
        copy_mapped<kTerms>(call, done, n, map, out + i * size, x + image_of(call, i) * call.image_stride);
      }
    }
  }
}

template <typename Out, typename In>
void run_forward(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  if (call.cos_sin != nullptr || call.channels_last) return run_mapped<1>(call, out, x, begin, end);
  const int64_t size = int64_t{call.channels} * call.height * call.width;
  for (int64_t i = begin; i < end; ++i) {
    copy_rows(call, transform_of(call, i), out + i * size, x + image_of(call, i) * call.image_stride);
  }
}

template <typename Out, typename In>
void run_backward(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  if (call.cos_sin != nullptr || call.channels_last) return run_mapped<kTakers>(call, out, x, begin, end);
  const int64_t size = int64_t{call.channels} * call.height * call.width;
  for (int64_t i = begin; i < end; ++i) {
    copy_rows(call, moved_back(transform_of(call, i)), out + i * size, x + i * call.image_stride);
  }
}

template <typename Out, typename In>
void run_parallel(const AugmentCall& call, const TensorView& out_view, const TensorView& x_view, bool backward,
                  int threads) {
  Out* out = out_view.as<Out>();
  const In* x = x_view.as<const In>();
  const int64_t size = int64_t{call.channels} * call.height * call.width;
  parallel_for(call.images, std::max<int64_t>(kGrain / size, 1), threads, [=, &call](int64_t begin, int64_t end) {
    (backward ? run_backward<Out, In> : run_forward<Out, In>)(call, out, x, begin, end);
  });
}

template <typename Out>
void run(const AugmentCall& call, const TensorView& out, const TensorView& x, bool backward, int threads) {
  if (out.numel == 0) return;
  if (x.dtype == DType::kFloat32) return run_parallel<Out, float>(call, out, x, backward, threads);
  if (x.dtype == DType::kBFloat16) return run_parallel<Out, BFloat16>(call, out, x, backward, threads);
  run_parallel<Out, uint8_t>(call, out, x, backward, threads);
}

}  // namespace

void augment_cpu(const TensorView& out, const TensorView& x, const Optional& index, const Optional& top_left,
                 const Optional& flip, const Optional& cos_sin, int64_t pad, int threads) {
  const AugmentCall call = augment_call(out, x, index, top_left, flip, cos_sin, pad, kDLCPU);
  check_dtype(x, {DType::kUInt8, DType::kFloat32, DType::kBFloat16});
  check_values(call, index, top_left, cos_sin);
  (out.dtype == DType::kFloat32 ? run<float> : run<BFloat16>)(call, out, x, false, threads);
}

void augment_backward_cpu(const TensorView& out, const TensorView& grad, const Optional& top_left, const Optional& flip,
                          const Optional& cos_sin, int64_t pad, int threads) {
  const AugmentCall call = augment_call(out, grad, std::nullopt, top_left, flip, cos_sin, pad, kDLCPU);
  check_dtype(grad, {DType::kFloat32, DType::kBFloat16});
  check_values(call, std::nullopt, top_left, cos_sin);
  (out.dtype == DType::kFloat32 ? run<float> : run<BFloat16>)(call, out, grad, true, threads);
}

}  // namespace puat
