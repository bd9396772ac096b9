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
  const int begin = std::clamp(t.step > 0 ? -t.left : t.left - t.width + 1, 0, t.width);
  const int end = std::clamp(t.step > 0 ? t.width - t.left : t.left + 1, begin, t.width);
  const int64_t first = t.left + t.step * begin, step = int64_t{t.step} * call.column_stride;
  if (t.top == 0 && t.left == 0 && step == 1 && call.row_stride == t.width) {  // nothing moves: planes at once
    const int plane = t.height * t.width;
    for (int c = 0; c < call.channels; ++c) {
      copy_row(out + int64_t{c} * plane, x + c * int64_t{call.channel_stride}, plane, 1);
    }
    return;
  }
  for (int c = 0; c < call.channels; ++c) {
    for (int i = 0; i < t.height; ++i, out += t.width) {
      const int64_t y = t.top + i;
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

// Where in x the pixels stand that `n` pixels of the result copy, -1 for none; and of those few that are a sum, as a
// gradient's may be, which they are and where its terms stand.
struct PixelMap {
  int n, sums;
  int single[kPatch];
  int sum[kPatch];
  int count[kPatch];
  int terms[kTakers][kPatch];
};

// Pixels (y, x) to (y, x + n - 1).
PUAT_SIMD void map_row(const Transform t, int y, int x, int n, int row_stride, int column_stride, int* place) {
  for (int i = 0; i < n; ++i) {
    const Pixel from = source_of(t, y, x + i);
    place[i] = from.y < 0 ? -1 : from.y * row_stride + from.x * column_stride;
  }
}

PUAT_SIMD void map_row_back(const Transform t, int y, int x, int n, int row_stride, int column_stride, int k,
                            int* place) {
  for (int i = 0; i < n; ++i) {
    const Pixel from = taker_of(t, y, x + i, k);
    place[i] = from.y < 0 ? -1 : from.y * row_stride + from.x * column_stride;
  }
}

// Pixels from `begin` on, row by row. backward: x is the gradient of the result.
void map_pixels(const AugmentCall& call, const Transform& t, bool backward, int begin, PixelMap* map) {
  for (int done = 0, n; done < map->n; done += n) {
    const int y = (begin + done) / t.width, x = (begin + done) % t.width;
    n = std::min(t.width - x, map->n - done);
    if (!backward) map_row(t, y, x, n, call.row_stride, call.column_stride, map->single + done);
    for (int k = 0; backward && k < kTakers; ++k) {
      map_row_back(t, y, x, n, call.row_stride, call.column_stride, k, map->terms[k] + done);
    }
  }
}

// Of a map backward: which pixels have one term, and which more.
PUAT_SIMD void sort_out(PixelMap* map) {
  const auto& terms = map->terms;
  const int n = map->n;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const int upper = terms[0][i] > terms[1][i] ? terms[0][i] : terms[1][i];
    const int lower = terms[2][i] > terms[3][i] ? terms[2][i] : terms[3][i];
    map->single[i] = upper > lower ? upper : lower;
    map->count[i] = (terms[0][i] >= 0) + (terms[1][i] >= 0) + (terms[2][i] >= 0) + (terms[3][i] >= 0);
  }
  map->sums = 0;
  for (int i = 0; i < n; ++i) {
    map->sum[map->sums] = i;
    map->sums += map->count[i] > 1;
  }
}

// The pixels of one channel; `step` apart in the result.
template <typename Out, typename In>
PUAT_SIMD void copy_single(const PixelMap& map, Out* out, const In* x, int64_t step) {
  const int n = map.n;
  const int* place = map.single;
  const auto value = [&](int i) {
    const float found = value_of(x[place[i] < 0 ? 0 : place[i]]);  // wanted or not: a load that vectorises
    return place[i] < 0 ? 0.0f : found;
  };
  if (step == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) store(&out[i], value(i));
  } else {
    for (int i = 0; i < n; ++i) store(&out[i * step], value(i));
  }
}

template <typename Out, typename In>
void copy_sums(const PixelMap& map, Out* out, const In* x, int64_t step) {
  for (int j = 0; j < map.sums; ++j) {
    float sum = 0.0f;
    for (const auto& places : map.terms) {
      const int place = places[map.sum[j]];
      const float value = value_of(x[place < 0 ? 0 : place]);  // no branch: which places are there is hard to foretell
      sum += place < 0 ? 0.0f : value;
    }
    store(&out[map.sum[j] * step], sum);
  }
}

// Images [begin, end), pixel by pixel. Where they share their draws, they share the map too.
template <bool kBackward, typename Out, typename In>
void run_mapped(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  const int pixels = call.height * call.width;
  const int64_t size = int64_t{call.channels} * pixels;
  const int64_t step = call.channels_last ? call.channels : 1, plane = call.channels_last ? 1 : pixels;
  const int64_t group = call.shares_draws() ? end - begin : 1;
  PixelMap map;
  for (int64_t first = begin; first < end; first += group) {
    const Transform t = transform_of(call, first);
    for (int done = 0; done < pixels; done += kPatch) {
      map.n = std::min(kPatch, pixels - done);
      map_pixels(call, t, kBackward, done, &map);
      if (kBackward) sort_out(&map);
      for (int64_t i = first; i < first + group; ++i) {
        for (int c = 0; c < call.channels; ++c) {
          Out* to = out + i * size + done * step + c * plane;
          const In* from = x + image_of(call, i) * call.image_stride + c * int64_t{call.channel_stride};
          copy_single(map, to, from, step);
          if (kBackward) copy_sums(map, to, from, step);
        }
      }
    }
  }
}

template <typename Out, typename In>
void run_forward(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  if (call.cos_sin != nullptr || call.channels_last) return run_mapped<false>(call, out, x, begin, end);
  const int64_t size = int64_t{call.channels} * call.height * call.width;
  for (int64_t i = begin; i < end; ++i) {
    copy_rows(call, transform_of(call, i), out + i * size, x + image_of(call, i) * call.image_stride);
  }
}

template <typename Out, typename In>
void run_backward(const AugmentCall& call, Out* out, const In* x, int64_t begin, int64_t end) {
  if (call.cos_sin != nullptr || call.channels_last) return run_mapped<true>(call, out, x, begin, end);
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
