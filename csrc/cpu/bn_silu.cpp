#include "bn_silu.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// The unit of work, in floats: stays in the second level cache, and is long enough for single precision sums of it.
constexpr int64_t kBlock = 32768;

// Loops run over a strip of several pixels at once, so that few channels fill the vectors too, and so that a sum is not
// added to again before the processor is done with the last addition.
constexpr int64_t kStrip = 512;

// Rows of floats, each beginning a cache line.
class Rows {
 public:
  Rows(int64_t rows, int64_t size)
      : stride_((size + 15) / 16 * 16),
        data_(static_cast<float*>(::operator new(rows * stride_ * sizeof(float), kAlignment))) {}
  ~Rows() { ::operator delete(data_, kAlignment); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  float* operator[](int64_t row) const { return data_ + row * stride_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  const int64_t stride_;
  float* const data_;
};

// How the pixels are cut up: by their shape alone, so that no sum depends on the number of threads.
struct Blocks {
  const int64_t groups, channels, group_pixels, pixels, per_group, strip_pixels;

  Blocks(const Pixels& all, int64_t groups)
      : groups(groups),
        channels(all.channels),
        group_pixels(all.count() / groups),
        pixels(std::max<int64_t>(1, kBlock / std::max<int64_t>(1, channels))),
        per_group((group_pixels + pixels - 1) / pixels),
        strip_pixels(kStrip / std::max<int64_t>(1, channels) + 1) {}

  int64_t count() const { return groups * per_group; }
  int64_t group(int64_t block) const { return block / per_group; }
  int64_t begin(int64_t block) const { return group(block) * group_pixels + block % per_group * pixels; }
  int64_t end(int64_t block) const { return std::min(begin(block) + pixels, (group(block) + 1) * group_pixels); }
  int64_t strip() const { return strip_pixels * channels; }

  template <typename Body>
  void for_each(int threads, const Body& body) const {
    parallel_for(count(), 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) body(block);
    });
  }

  // to[lane] = value(channel of the lane), for all lanes of a strip.
  template <typename Value>
  void spread(float* to, const Value& value) const {
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(value(c));
    for (int64_t i = channels; i < strip(); ++i) to[i] = to[i - channels];
  }

  // sums[channel] += each of its lanes.
  void add_lanes(std::vector<double>& sums, const float* lanes) const {
    for (int64_t p = 0; p < strip_pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += lanes[p * channels + c];
    }
  }
};

// Per lane of a strip: y = (h - mean) scale + bias.
struct Affine {
  const float *mean, *scale, *bias;
};

// The rows of each group's Affine.
class Affines {
 public:
  Affines(const Blocks& blocks, const TensorView& mean, const TensorView& rstd, const TensorView& weight,
          const TensorView& bias)
      : rows_(3 * blocks.groups, blocks.strip()) {
    for (int64_t g = 0; g < blocks.groups; ++g) {
      const float* group_mean = mean.as<float>() + g * blocks.channels;
      const float* group_rstd = rstd.as<float>() + g * blocks.channels;
      blocks.spread(rows_[3 * g], [=](int64_t c) { return group_mean[c]; });
      blocks.spread(rows_[3 * g + 1], [=, &weight](int64_t c) { return group_rstd[c] * weight.as<float>()[c]; });
      blocks.spread(rows_[3 * g + 2], [&](int64_t c) { return bias.as<float>()[c]; });
    }
  }
  Affine operator[](int64_t group) const { return {rows_[3 * group], rows_[3 * group + 1], rows_[3 * group + 2]}; }

 private:
  const Rows rows_;
};

// body(at, padded_at, n) for each strip of a block: n floats, first of a pixel at float `at` of the images and
// `padded_at` of the padded ones.
template <typename Body>
void for_strips(const Pixels& pixels, const Blocks& blocks, int64_t block, const Body& body) {
  const int64_t channels = blocks.channels, end = blocks.end(block);
  for (int64_t begin = blocks.begin(block), count; begin < end; begin += count) {
    count = std::min(end - begin, pixels.run() - begin % pixels.run());
    const int64_t padded = pixels.padded_index(begin);
    for (int64_t p = 0; p < count; p += blocks.strip_pixels) {
      body((begin + p) * channels, (padded + p) * channels, std::min(blocks.strip_pixels, count - p) * channels);
    }
  }
}

// The loops, over n lanes of a strip: of float32 or bfloat16, computed and summed in float32.

template <typename To, typename A, typename B>
PUAT_INLINE void add_lanes(To* to, const A* a, const B* b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(&to[i], to_float(a[i]) + to_float(b[i]));
}

template <typename T>
PUAT_INLINE void moments_lanes(float* sum, float* square, const T* h, const float* centre, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = to_float(h[i]) - centre[i];
    sum[i] += d;
    square[i] += d * d;
  }
}

template <typename T>
PUAT_INLINE void apply_lanes(T* out, const T* h, Affine to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(&out[i], silu((to_float(h[i]) - to.mean[i]) * to.scale[i] + to.bias[i]));
  }
}

template <typename T>
PUAT_INLINE void activation_grad_lanes(float* dy, const T* grad_out, const T* h, Affine to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dy[i] = to_float(grad_out[i]) * silu_grad((to_float(h[i]) - to.mean[i]) * to.scale[i] + to.bias[i]);
  }
}

template <typename T>
PUAT_INLINE void products_lanes(float* sum, float* product, const float* dy, const T* h, const float* mean, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sum[i] += dy[i];
    product[i] += dy[i] * (to_float(h[i]) - mean[i]);
  }
}

template <typename T>
PUAT_INLINE void normalisation_grad_lanes(float* grad_x, const T* h, Affine to, const float* offset, const float* slope,
                                          int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    grad_x[i] = to.scale[i] * (grad_x[i] - offset[i] - slope[i] * (to_float(h[i]) - to.mean[i]));
  }
}

// A loop is compiled for several processors as a function, which a template cannot be: one for each type.
#define PUAT_LOOPS(T)                                                                                                  \
  PUAT_SIMD void add_moments(float* sum, float* square, const T* h, const float* centre, int64_t n) {                  \
    moments_lanes(sum, square, h, centre, n);                                                                          \
  }                                                                                                                    \
  PUAT_SIMD void apply(T* out, const T* h, Affine to, int64_t n) { apply_lanes(out, h, to, n); }                       \
  PUAT_SIMD void activation_grad(float* dy, const T* grad_out, const T* h, Affine to, int64_t n) {                     \
    activation_grad_lanes(dy, grad_out, h, to, n);                                                                     \
  }                                                                                                                    \
  PUAT_SIMD void add_products(float* sum, float* product, const float* dy, const T* h, const float* mean, int64_t n) { \
    products_lanes(sum, product, dy, h, mean, n);                                                                      \
  }                                                                                                                    \
  /* dy becomes grad_x. */                                                                                             \
  PUAT_SIMD void normalisation_grad(float* grad_x, const T* h, Affine to, const float* offset, const float* slope,     \
                                    int64_t n) {                                                                       \
    normalisation_grad_lanes(grad_x, h, to, offset, slope, n);                                                         \
  }
PUAT_LOOPS(float)
PUAT_LOOPS(BFloat16)
#undef PUAT_LOOPS

PUAT_SIMD void add(float* to, const float* a, const float* b, int64_t n) { add_lanes(to, a, b, n); }
PUAT_SIMD void add(float* to, const float* a, const BFloat16* b, int64_t n) { add_lanes(to, a, b, n); }
PUAT_SIMD void add(BFloat16* to, const BFloat16* a, const BFloat16* b, int64_t n) { add_lanes(to, a, b, n); }

PUAT_SIMD void copy(BFloat16* to, const float* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(&to[i], from[i]);
}

// Mean and sum of squared deviations of `count` values for each channel; add() is Chan's formula.
struct Moments {
  double count = 0.0;
  std::vector<double> mean, squares;

  explicit Moments(int64_t channels) : mean(channels), squares(channels) {}

  void add(double more, const std::vector<double>& more_mean, const std::vector<double>& more_squares) {
    const double share = more / (count + more);
    for (size_t c = 0; c < mean.size(); ++c) {
      const double delta = more_mean[c] - mean[c];
      mean[c] += delta * share;
      squares[c] += more_squares[c] + delta * delta * count * share;
    }
    count += more;
  }
};

// Per block: a row of centres near the block's means, of sums of h - centre, and of sums of its square. The centres
// take large means out before anything is squared; what rounding leaves of the mean is in the sums.
template <typename T>
void block_moments(const Pixels& pixels, const Blocks& blocks, const Rows& rows, int64_t block, T* h, const T* x,
                   const T* residual) {
  float *centre = rows[3 * block], *sum = rows[3 * block + 1], *square = rows[3 * block + 2];
  const int64_t channels = blocks.channels, strip = blocks.strip();
  const float count = static_cast<float>(blocks.end(block) - blocks.begin(block));
  std::fill(sum, sum + strip, 0.0f);
  for_strips(pixels, blocks, block, [=](int64_t at, int64_t, int64_t n) {
    if (residual != nullptr) add(h + at, x + at, residual + at, n);
    add(sum, sum, h + at, n);
  });
  for (int64_t i = channels; i < strip; ++i) sum[i % channels] += sum[i];
  blocks.spread(centre, [=](int64_t c) { return sum[c] / count; });
  std::fill(sum, sum + strip, 0.0f);
  std::fill(square, square + strip, 0.0f);
  for_strips(pixels, blocks, block,
             [=](int64_t at, int64_t, int64_t n) { add_moments(sum, square, h + at, centre, n); });
}

Moments group_moments(const Blocks& blocks, const Rows& rows, int64_t group) {
  Moments all(blocks.channels);
  std::vector<double> mean(blocks.channels), squares(blocks.channels);
  for (int64_t block = group * blocks.per_group; block < (group + 1) * blocks.per_group; ++block) {
    const double count = static_cast<double>(blocks.end(block) - blocks.begin(block));
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(squares.begin(), squares.end(), 0.0);
    blocks.add_lanes(mean, rows[3 * block + 1]);
    blocks.add_lanes(squares, rows[3 * block + 2]);
    for (int64_t c = 0; c < blocks.channels; ++c) {
      squares[c] -= mean[c] * mean[c] / count;
      mean[c] = rows[3 * block][c] + mean[c] / count;
    }
    all.add(count, mean, squares);
  }
  return all;
}

void update(float* running, double batch, double momentum) {
  *running = static_cast<float>((1.0 - momentum) * *running + momentum * batch);
}

// What the backward stages share. T: of grad_out, h, grad_h and grad_x.
template <typename T>
struct Backward {
  static constexpr bool kHalf = std::is_same_v<T, BFloat16>;
  const Pixels pixels;
  const Blocks blocks;
  const Affines affines;
  const T *grad_out, *h;
  const float *mean, *rstd;
  const int threads;

  Backward(const Pixels& pixels, const TensorView& grad_out, const TensorView& h, const TensorView& mean,
           const TensorView& rstd, const TensorView& weight, const TensorView& bias, int threads)
      : pixels(pixels),
        blocks(pixels, mean.shape[0]),
        affines(blocks, mean, rstd, weight, bias),
        grad_out(grad_out.as<T>()),
        h(h.as<T>()),
        mean(mean.as<float>()),
        rstd(rstd.as<float>()),
        threads(threads) {}

  // The sums; dy is kept where there is room for it.
  void reduce(float* sum_dy, float* sum_dy_xhat, float* dy) const {
    const Rows rows(3 * blocks.count(), blocks.strip());
    blocks.for_each(threads, [&](int64_t block) {
      float *sum = rows[3 * block], *product = rows[3 * block + 1], *room = rows[3 * block + 2];
      const Affine to = affines[blocks.group(block)];
      std::fill(sum, sum + blocks.strip(), 0.0f);
      std::fill(product, product + blocks.strip(), 0.0f);
      for_strips(pixels, blocks, block, [&](int64_t at, int64_t padded_at, int64_t n) {
        float* const strip_dy = dy == nullptr ? room : dy + at;
        activation_grad(strip_dy, grad_out + padded_at, h + at, to, n);
        add_products(sum, product, strip_dy, h + at, to.mean, n);
      });
    });
    std::vector<double> sum(blocks.channels), product(blocks.channels);
    for (int64_t g = 0; g < blocks.groups; ++g) {
      std::fill(sum.begin(), sum.end(), 0.0);
      std::fill(product.begin(), product.end(), 0.0);
      for (int64_t block = g * blocks.per_group; block < (g + 1) * blocks.per_group; ++block) {
        blocks.add_lanes(sum, rows[3 * block]);
        blocks.add_lanes(product, rows[3 * block + 1]);
      }
      for (int64_t c = 0, at = g * blocks.channels; c < blocks.channels; ++c, ++at) {
        sum_dy[at] = static_cast<float>(sum[c]);
        sum_dy_xhat[at] = static_cast<float>(product[c] * rstd[at]);
      }
    }
  }

  // has_dy: grad_x, float32, holds dy. sum_dy and sum_dy_xhat may be null, grad_h too.
  void input_grad(T* grad_x, bool has_dy, const T* grad_h, const float* sum_dy, const float* sum_dy_xhat) const {
    const Rows rows(2 * blocks.groups, blocks.strip());  // offset and slope of normalisation_grad
    const double count = static_cast<double>(blocks.group_pixels);
    for (int64_t g = 0; g < blocks.groups; ++g) {
      const int64_t first = g * blocks.channels;
      blocks.spread(rows[2 * g], [=](int64_t c) { return sum_dy ? sum_dy[first + c] / count : 0.0; });
      blocks.spread(rows[2 * g + 1],
                    [=](int64_t c) { return sum_dy_xhat ? sum_dy_xhat[first + c] / count * rstd[first + c] : 0.0; });
    }
    blocks.for_each(threads, [&](int64_t block) {
      const int64_t g = blocks.group(block);
      std::vector<float> room(kHalf ? blocks.strip() : 0);
      for_strips(pixels, blocks, block, [&](int64_t at, int64_t padded_at, int64_t n) {
        float* grad;
        if constexpr (kHalf) {
          grad = room.data();
        } else {
          grad = grad_x + at;
        }
        if (!has_dy) activation_grad(grad, grad_out + padded_at, h + at, affines[g], n);
        normalisation_grad(grad, h + at, affines[g], rows[2 * g], rows[2 * g + 1], n);
        if (grad_h != nullptr) add(grad, grad, grad_h + at, n);
        if constexpr (kHalf) copy(grad_x + at, grad, n);
      });
    });
  }
};

// The padding of `out`, whose inner part is left alone.
template <typename T>
void clear_padding(T* out, const Pixels& to, int threads) {
  const int64_t row = to.padded_width() * to.channels, image = to.padded_height() * row;
  const int64_t left = to.left * to.channels, right = to.right * to.channels;
  parallel_for(to.images, kBlock / std::max<int64_t>(1, image) + 1, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      T* begin = out + n * image;
      T* bottom = begin + (to.top + to.height) * row;
      std::fill(begin, begin + to.top * row, T{});
      for (T* at = begin + to.top * row; at < bottom; at += row) {
        std::fill(at, at + left, T{});
        std::fill(at + row - right, at + row, T{});
      }
      std::fill(bottom, begin + image, T{});
    }
  });
}

bool is_half(const TensorView& t) { return t.dtype == DType::kBFloat16; }

// body(value of the type that h is of).
template <typename Body>
void with_backward(const TensorView& h, const Body& body) {
  if (is_half(h)) {
    body(BFloat16{});
  } else {
    body(0.0f);
  }
}

template <typename T>
void apply_all(const TensorView& out, const TensorView& h, const Pixels& pixels, const Blocks& blocks,
               const Affines& affines, int threads) {
  if (pixels.padded()) clear_padding(out.as<T>(), pixels, threads);
  blocks.for_each(threads, [&](int64_t block) {
    const Affine to = affines[blocks.group(block)];
    for_strips(pixels, blocks, block, [&](int64_t at, int64_t padded_at, int64_t n) {
      apply(out.as<T>() + padded_at, h.as<T>() + at, to, n);
    });
  });
}

template <typename T>
void moments_all(const Pixels& pixels, const Blocks& blocks, const Rows& rows, const std::optional<TensorView>& h,
                 const TensorView& x, const std::optional<TensorView>& residual, int threads) {
  T* summed = h ? h->as<T>() : x.as<T>();
  blocks.for_each(threads, [&](int64_t block) {
    block_moments(pixels, blocks, rows, block, summed, x.as<T>(), residual ? residual->as<T>() : nullptr);
  });
}

}  // namespace

void bn_silu_stats_cpu(const TensorView& mean, const std::optional<TensorView>& var, const TensorView& rstd,
                       const std::optional<TensorView>& h, const TensorView& x,
                       const std::optional<TensorView>& residual, const std::optional<TensorView>& running_mean,
                       const std::optional<TensorView>& running_var, double momentum, double eps, int64_t groups,
                       int threads) {
  check_bn_silu_stats(mean, var, rstd, h, x, residual, running_mean, running_var, groups);
  const Pixels pixels(x);
  const Blocks blocks(pixels, groups);
  const Rows rows(3 * blocks.count(), blocks.strip());
  (is_half(x) ? moments_all<BFloat16> : moments_all<float>)(pixels, blocks, rows, h, x, residual, threads);
  const double count = static_cast<double>(blocks.group_pixels);
  for (int64_t g = 0; g < groups; ++g) {
    const Moments moments = group_moments(blocks, rows, g);
    for (int64_t c = 0; c < blocks.channels; ++c) {
      const int64_t at = g * blocks.channels + c;
      const double biased = count > 0.0 ? moments.squares[c] / count : 0.0;
      mean.as<float>()[at] = static_cast<float>(moments.mean[c]);
      rstd.as<float>()[at] = static_cast<float>(1.0 / std::sqrt(biased + eps));
      if (var) var->as<float>()[at] = static_cast<float>(biased);
      if (running_mean && count > 0.0) {
        update(running_mean->as<float>() + c, moments.mean[c], momentum);
        update(running_var->as<float>() + c, moments.squares[c] / (count - 1.0), momentum);
      }
    }
  }
}

void bn_silu_apply_cpu(const TensorView& out, const TensorView& h, const TensorView& mean, const TensorView& rstd,
                       const TensorView& weight, const TensorView& bias, int64_t left, int64_t right, int64_t top,
                       int64_t bottom, int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(out, pixels, h);
  check_elementwise(out, h, pixels.padded());
  check_apart(out, {&mean, &rstd, &weight, &bias});
  const Blocks blocks(pixels, mean.shape[0]);
  const Affines affines(blocks, mean, rstd, weight, bias);
  (is_half(h) ? apply_all<BFloat16> : apply_all<float>)(out, h, pixels, blocks, affines, threads);
}

void bn_silu_reduce_cpu(const TensorView& sum_dy, const TensorView& sum_dy_xhat, const TensorView& grad_out,
                        const TensorView& h, const TensorView& mean, const TensorView& rstd, const TensorView& weight,
                        const TensorView& bias, int64_t left, int64_t right, int64_t top, int64_t bottom, int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(grad_out, pixels, h);
  check_sums(sum_dy, sum_dy_xhat, mean, {&grad_out, &h, &mean, &rstd, &weight, &bias});
  with_backward(h, [&](auto type) {
    const Backward<decltype(type)> backward(pixels, grad_out, h, mean, rstd, weight, bias, threads);
    backward.reduce(sum_dy.as<float>(), sum_dy_xhat.as<float>(), nullptr);
  });
}

void bn_silu_input_grad_cpu(const TensorView& grad_x, const TensorView& grad_out,
                            const std::optional<TensorView>& grad_h, const TensorView& h, const TensorView& mean,
                            const TensorView& rstd, const TensorView& weight, const TensorView& bias,
                            const std::optional<TensorView>& sum_dy, const std::optional<TensorView>& sum_dy_xhat,
                            int64_t left, int64_t right, int64_t top, int64_t bottom, int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(grad_out, pixels, h);
  check_grad_x(grad_x, grad_h, h, {&grad_out, &mean, &rstd, &weight, &bias, pointer(sum_dy), pointer(sum_dy_xhat)});
  check_together(sum_dy, sum_dy_xhat, "sum_dy and sum_dy_xhat");
  for (const auto& sum : {sum_dy, sum_dy_xhat}) {
    if (sum) check_table(*sum, mean.shape);
  }
  with_backward(h, [&](auto type) {
    using T = decltype(type);
    const Backward<T> backward(pixels, grad_out, h, mean, rstd, weight, bias, threads);
    backward.input_grad(grad_x.as<T>(), false, data<T>(grad_h), data<float>(sum_dy), data<float>(sum_dy_xhat));
  });
}

void bn_silu_backward_cpu(const TensorView& grad_x, const TensorView& sum_dy, const TensorView& sum_dy_xhat,
                          const TensorView& grad_out, const std::optional<TensorView>& grad_h, const TensorView& h,
                          const TensorView& mean, const TensorView& rstd, const TensorView& weight,
                          const TensorView& bias, int64_t left, int64_t right, int64_t top, int64_t bottom,
                          int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(grad_out, pixels, h);
  check_grad_x(grad_x, grad_h, h, {&grad_out, &mean, &rstd, &weight, &bias, &sum_dy, &sum_dy_xhat});
  check_sums(sum_dy, sum_dy_xhat, mean, {&grad_out, pointer(grad_h), &h, &mean, &rstd, &weight, &bias});
  with_backward(h, [&](auto type) {
    using T = decltype(type);
    const Backward<T> backward(pixels, grad_out, h, mean, rstd, weight, bias, threads);
    float* dy = nullptr;  // in bfloat16 it would be rounded: it is computed twice
    if constexpr (!Backward<T>::kHalf) dy = grad_x.as<float>();
    backward.reduce(sum_dy.as<float>(), sum_dy_xhat.as<float>(), dy);
    backward.input_grad(grad_x.as<T>(), dy != nullptr, data<T>(grad_h), sum_dy.as<float>(), sum_dy_xhat.as<float>());
  });
}

}  // namespace puat
