#include "bn_silu.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// The unit of work, in floats: stays in the second level cache, and is long enough for single precision sums of it.
constexpr int64_t kBlock = 32768;

// Loops run over a strip of several pixels at once, so that few channels fill the vectors too, and so that a sum is not
// added to again before the processor is done with the last addition.
constexpr int64_t kStrip = 256;

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

// body(first pixel, its place in the padded images, number of pixels) for each stretch of neighbours in [begin, end).
template <typename Body>
void for_runs(const Pixels& pixels, int64_t begin, int64_t end, const Body& body) {
  while (begin < end) {
    const int64_t count = std::min(end - begin, pixels.run() - begin % pixels.run());
    body(begin, pixels.padded_index(begin), count);
    begin += count;
  }
}

// The loops: over n floats from the first channel of a pixel on, lane i of each strip with lane i of the row arguments.

// h = x + residual, if there is one; sum += h or x.
PUAT_SIMD void add_up(float* sum, float* h, const float* x, const float* residual, int64_t n, int64_t strip) {
  for (int64_t at = 0; at < n; at += strip) {
    const int64_t length = std::min(strip, n - at);
    const float* from = x + at;
    if (residual != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) h[at + i] = x[at + i] + residual[at + i];
      from = h + at;
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) sum[i] += from[i];
  }
}

// sum += h - centre, square += (h - centre)^2.
PUAT_SIMD void add_moments(float* sum, float* square, const float* h, const float* centre, int64_t n, int64_t strip) {
  for (int64_t at = 0; at < n; at += strip) {
    const int64_t length = std::min(strip, n - at);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const float d = h[at + i] - centre[i];
      sum[i] += d;
      square[i] += d * d;
    }
  }
}

PUAT_SIMD void apply(float* out, const float* h, Affine to, int64_t n, int64_t strip) {
  for (int64_t at = 0; at < n; at += strip) {
    const int64_t length = std::min(strip, n - at);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) out[at + i] = silu((h[at + i] - to.mean[i]) * to.scale[i] + to.bias[i]);
  }
}

// sum += dy, product += dy (h - mean).
PUAT_SIMD void add_gradients(float* sum, float* product, const float* grad_out, const float* h, Affine to, int64_t n,
                             int64_t strip) {
  for (int64_t at = 0; at < n; at += strip) {
    const int64_t length = std::min(strip, n - at);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const float d = h[at + i] - to.mean[i];
      const float dy = grad_out[at + i] * silu_grad(d * to.scale[i] + to.bias[i]);
      sum[i] += dy;
      product[i] += dy * d;
    }
  }
}

// scale (dy - offset - slope (h - mean)).
inline float input_grad(float grad_out, float h, float mean, float scale, float bias, float offset, float slope) {
  const float d = h - mean;
  return scale * (grad_out * silu_grad(d * scale + bias) - offset - slope * d);
}

// grad_x = input_grad(...), plus grad_h if there is one.
PUAT_SIMD void input_grads(float* grad_x, const float* grad_out, const float* grad_h, const float* h, Affine to,
                           const float* offset, const float* slope, int64_t n, int64_t strip) {
  for (int64_t at = 0; at < n; at += strip) {
    const int64_t length = std::min(strip, n - at);
    if (grad_h != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        grad_x[at + i] = grad_h[at + i] + input_grad(grad_out[at + i], h[at + i], to.mean[i], to.scale[i], to.bias[i],
                                                     offset[i], slope[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        grad_x[at + i] =
            input_grad(grad_out[at + i], h[at + i], to.mean[i], to.scale[i], to.bias[i], offset[i], slope[i]);
      }
    }
  }
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
void block_moments(const Blocks& blocks, const Rows& rows, int64_t block, float* h, const float* x,
                   const float* residual) {
  float *centre = rows[3 * block], *sum = rows[3 * block + 1], *square = rows[3 * block + 2];
  const int64_t channels = blocks.channels, strip = blocks.strip(), first = blocks.begin(block) * channels;
  const int64_t pixels = blocks.end(block) - blocks.begin(block);
  std::fill(sum, sum + strip, 0.0f);
  add_up(sum, h + first, x + first, residual == nullptr ? nullptr : residual + first, pixels * channels, strip);
  for (int64_t i = channels; i < strip; ++i) sum[i % channels] += sum[i];
  blocks.spread(centre, [=](int64_t c) { return sum[c] / static_cast<float>(pixels); });
  std::fill(sum, sum + strip, 0.0f);
  std::fill(square, square + strip, 0.0f);
  add_moments(sum, square, h + first, centre, pixels * channels, strip);
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

// The padding of `out`, whose inner part is left alone.
void clear_padding(float* out, const Pixels& to, int threads) {
  const int64_t row = to.padded_width() * to.channels, image = to.padded_height() * row;
  const int64_t left = to.left * to.channels, right = to.right * to.channels;
  parallel_for(to.images, kBlock / std::max<int64_t>(1, image) + 1, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      float* begin = out + n * image;
      float* bottom = begin + (to.top + to.height) * row;
      std::fill(begin, begin + to.top * row, 0.0f);
      for (float* at = begin + to.top * row; at < bottom; at += row) {
        std::fill(at, at + left, 0.0f);
        std::fill(at + row - right, at + row, 0.0f);
      }
      std::fill(bottom, begin + image, 0.0f);
    }
  });
}

}  // namespace

void bn_silu_stats_cpu(const TensorView& mean, const std::optional<TensorView>& var, const TensorView& rstd,
                       const std::optional<TensorView>& h, const TensorView& x,
                       const std::optional<TensorView>& residual, const std::optional<TensorView>& running_mean,
                       const std::optional<TensorView>& running_var, double momentum, double eps, int64_t groups,
                       int threads) {
  check_bn_silu_stats(mean, var, rstd, h, x, residual, running_mean, running_var, groups);
  const Blocks blocks(Pixels(x), groups);
  const Rows rows(3 * blocks.count(), blocks.strip());
  float* data = h ? h->as<float>() : x.as<float>();
  blocks.for_each(threads, [&](int64_t block) {
    block_moments(blocks, rows, block, data, x.as<float>(), residual ? residual->as<float>() : nullptr);
  });
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
  check_padded(out, pixels);
  check_elementwise(out, h, pixels.padded());
  check_apart(out, {&mean, &rstd, &weight, &bias});
  const Blocks blocks(pixels, mean.shape[0]);
  const Affines affines(blocks, mean, rstd, weight, bias);
  if (pixels.padded()) clear_padding(out.as<float>(), pixels, threads);
  const int64_t channels = pixels.channels;
  blocks.for_each(threads, [&](int64_t block) {
    for_runs(pixels, blocks.begin(block), blocks.end(block), [&](int64_t from, int64_t to, int64_t count) {
      apply(out.as<float>() + to * channels, h.as<float>() + from * channels, affines[blocks.group(block)],
            count * channels, blocks.strip());
    });
  });
}

void bn_silu_reduce_cpu(const TensorView& sum_dy, const TensorView& sum_dy_xhat, const TensorView& grad_out,
                        const TensorView& h, const TensorView& mean, const TensorView& rstd, const TensorView& weight,
                        const TensorView& bias, int64_t left, int64_t right, int64_t top, int64_t bottom, int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(grad_out, pixels);
  for (const TensorView* sum : {&sum_dy, &sum_dy_xhat}) {
    check_table(*sum, mean.shape);
    check_apart(*sum, {&grad_out, &h, &mean, &rstd, &weight, &bias});
  }
  check_apart(sum_dy, {&sum_dy_xhat});
  const Blocks blocks(pixels, mean.shape[0]);
  const Affines affines(blocks, mean, rstd, weight, bias);
  const Rows rows(2 * blocks.count(), blocks.strip());
  const int64_t channels = pixels.channels, strip = blocks.strip();
  blocks.for_each(threads, [&](int64_t block) {
    float *sum = rows[2 * block], *product = rows[2 * block + 1];
    std::fill(sum, sum + strip, 0.0f);
    std::fill(product, product + strip, 0.0f);
    for_runs(pixels, blocks.begin(block), blocks.end(block), [&](int64_t at, int64_t padded_at, int64_t count) {
      add_gradients(sum, product, grad_out.as<float>() + padded_at * channels, h.as<float>() + at * channels,
                    affines[blocks.group(block)], count * channels, strip);
    });
  });
  std::vector<double> sum(channels), product(channels);
  for (int64_t g = 0; g < blocks.groups; ++g) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(product.begin(), product.end(), 0.0);
    for (int64_t block = g * blocks.per_group; block < (g + 1) * blocks.per_group; ++block) {
      blocks.add_lanes(sum, rows[2 * block]);
      blocks.add_lanes(product, rows[2 * block + 1]);
    }
    for (int64_t c = 0; c < channels; ++c) {
      sum_dy.as<float>()[g * channels + c] = static_cast<float>(sum[c]);
      sum_dy_xhat.as<float>()[g * channels + c] = static_cast<float>(product[c] * rstd.as<float>()[g * channels + c]);
    }
  }
}

void bn_silu_input_grad_cpu(const TensorView& grad_x, const TensorView& grad_out,
                            const std::optional<TensorView>& grad_h, const TensorView& h, const TensorView& mean,
                            const TensorView& rstd, const TensorView& weight, const TensorView& bias,
                            const std::optional<TensorView>& sum_dy, const std::optional<TensorView>& sum_dy_xhat,
                            int64_t left, int64_t right, int64_t top, int64_t bottom, int threads) {
  const Pixels pixels = check_bn_silu(h, mean, rstd, weight, bias, left, right, top, bottom);
  check_padded(grad_out, pixels);
  check_together(sum_dy, sum_dy_xhat, "sum_dy and sum_dy_xhat");
  check_channels_last(grad_x, h.shape);
  check_elementwise(grad_x, h, false);
  check_elementwise(grad_x, grad_out, pixels.padded());
  if (grad_h) {
    check_channels_last(*grad_h, h.shape);
    check_elementwise(grad_x, *grad_h, false);
  }
  for (const auto& sum : {sum_dy, sum_dy_xhat}) {
    if (sum) check_table(*sum, mean.shape);
  }
  check_apart(grad_x, {&mean, &rstd, &weight, &bias, pointer(sum_dy), pointer(sum_dy_xhat)});
  const Blocks blocks(pixels, mean.shape[0]);
  const Affines affines(blocks, mean, rstd, weight, bias);
  const Rows rows(2 * blocks.groups, blocks.strip());  // offset and slope of input_grad
  const int64_t channels = pixels.channels;
  for (int64_t g = 0; g < blocks.groups; ++g) {
    const double count = static_cast<double>(blocks.group_pixels);
    const int64_t first = g * channels;
    blocks.spread(rows[2 * g], [&](int64_t c) { return sum_dy ? sum_dy->as<float>()[first + c] / count : 0.0; });
    blocks.spread(rows[2 * g + 1], [&](int64_t c) {
      return sum_dy_xhat ? sum_dy_xhat->as<float>()[first + c] / count * rstd.as<float>()[first + c] : 0.0;
    });
  }
  blocks.for_each(threads, [&](int64_t block) {
    const int64_t g = blocks.group(block);
    for_runs(pixels, blocks.begin(block), blocks.end(block), [&](int64_t at, int64_t padded_at, int64_t count) {
      const int64_t first = at * channels;
      input_grads(grad_x.as<float>() + first, grad_out.as<float>() + padded_at * channels,
                  grad_h ? grad_h->as<float>() + first : nullptr, h.as<float>() + first, affines[g], rows[2 * g],
                  rows[2 * g + 1], count * channels, blocks.strip());
    });
  });
}

}  // namespace puat
