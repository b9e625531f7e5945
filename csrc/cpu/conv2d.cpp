// Sparse convolution y += S * x, its gradient for x and its gradient for the values of S.
//
// All three run on "flat planes". The padded input is copied once into planes of a common pitch, one plane per
// (channel, row phase, column phase), where the phase is the padded coordinate modulo the stride. In that layout a
// kernel tap (kh, kw) is ONE constant offset, whatever the stride, dilation and padding:
//
//     y[oc, p] = sum over nonzeros of row oc:  value * planes[offset(nonzero) + p]      p = row * pitch + column
//
// so the inner loop is a broadcast and a contiguous FMA per vector, without bounds checks or index arithmetic. The
// columns between the map's width and the pitch compute garbage that is never stored (2/58 of the lanes for a 3x3
// kernel on a 56-wide map, more on tiny maps). The gradient for x is the same loop over S^T: its planes hold dy
// with a margin of the kernel's reach, and each (in_channel, row phase, column phase) is one output row. The gradient
// for a value is the dot product of its dy plane with its shifted x plane.
//
// Geometry: a step packs as many images (or, when one image is too large, as many rows of it) as fill about 1 MB, all
// threads together, then the pairs (tile of up to 12 vectors of positions, block of 16 output rows) are shared out.
// 12 accumulators hide the FMA latency and leave registers for the broadcast value on AVX2. Operations: 2 * nnz *
// positions; bytes: x and y once each plus 8 per nonzero and tile.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace cmd_ext::cpu {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr int64_t kPackedBytes = 1 << 20;
constexpr int64_t kVectorBytes = 32;
constexpr int kTileVecs = 12;
constexpr int64_t kRowBlock = 16;
constexpr int64_t kGrainOps = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An image seen as planes: row q, column t of plane (c, a, b) is pixel (q * phases_h + a - pad_h,
// t * phases_w + b - pad_w) of channel c.
template <class T>
struct Planes {
  Image<T> image;
  int64_t phases_h, phases_w, pad_h, pad_w;
  int64_t per_channel() const { return phases_h * phases_w; }
  int64_t count() const { return image.channels * per_channel(); }
};

// How the output rows of all images are cut into steps, and where things lie within one packed step.
struct Steps {
  int64_t batch, rows, cols;  // output rows and columns (in plane coordinates)
  int64_t pitch, height;      // of one packed image: columns and rows including the kernel's reach
  int64_t images, strip;      // per step: images, or output rows of one image
  int64_t plane;              // elements of one packed plane

  Steps(int64_t batch, int64_t rows, int64_t cols, int64_t reach_h, int64_t reach_w, int64_t planes, int64_t element)
      : batch(batch), rows(rows), cols(cols), pitch(cols + reach_w) {
    const int64_t row_bytes = std::max<int64_t>(1, planes * pitch * element);
    const int64_t rows_that_fit = kPackedBytes / row_bytes;
    strip = std::clamp<int64_t>(rows_that_fit - reach_h, std::min<int64_t>(rows, 4), rows);
    height = strip + reach_h;
    images = strip < rows ? 1 : std::clamp<int64_t>(rows_that_fit / height, 1, std::max<int64_t>(batch, 1));
    // Beyond the last position: the kernel's reach to the right and the rest of the last vector.
    plane = images * height * pitch + reach_w + kVectorBytes / element;
  }
  int64_t strips() const { return ceil_div(rows, strip); }
  int64_t count() const { return ceil_div(batch, images) * strips(); }
};

struct Step {
  int64_t image, images, row, rows;  // first image, images, first output row, output rows
  int64_t positions(const Steps& all) const { return ((images - 1) * all.height + rows) * all.pitch; }
};

Step step_at(const Steps& all, int64_t index) {
  const int64_t image = index / all.strips() * all.images, row = index % all.strips() * all.strip;
  return {image, std::min(all.images, all.batch - image), row, std::min(all.strip, all.rows - row)};
}

// Copies plane row q of one image: `cols` columns, zeros outside the image.
template <class T>
void pack_row(const Planes<const T>& in, const T* channel, int64_t a, int64_t b, int64_t q, int64_t cols, T* out) {
  const Image<const T>& x = in.image;
  const int64_t row = q * in.phases_h + a - in.pad_h;
  if (row < 0 || row >= x.height) return std::fill(out, out + cols, T(0)), void();
  const int64_t shift = b - in.pad_w;  // column t is pixel t * phases_w + shift
  const int64_t first = std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -shift), in.phases_w), 0, cols);
  const int64_t last = std::clamp<int64_t>(x.width > shift ? ceil_div(x.width - shift, in.phases_w) : 0, first, cols);
  std::fill(out, out + first, T(0));
  const T* source = channel + row * x.stride_h + (first * in.phases_w + shift) * x.stride_w;
  const int64_t stride = in.phases_w * x.stride_w;
  if (stride == 1)
    std::copy(source, source + (last - first), out + first);
  else
    for (int64_t t = first; t < last; ++t, source += stride) out[t] = *source;
  std::fill(out + last, out + cols, T(0));
}

// Fills the packed planes of a step. Rows from `valid_rows` on become zero (dy in the gradient for the values).
template <class T>
void pack(const Planes<const T>& in, const Steps& all, const Step& step, int64_t valid_rows, int64_t valid_cols,
          T* packed, const ParallelFor& parallel_for) {
  const int64_t grain = std::max<int64_t>(1, kGrainOps / (all.plane + 1));
  parallel_for(in.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t c = p / in.per_channel(), phase = p % in.per_channel();
      T* out = packed + p * all.plane;
      for (int64_t i = 0; i < step.images; ++i) {
        const T* channel = in.image.data + (step.image + i) * in.image.stride_n + c * in.image.stride_c;
        for (int64_t q = 0; q < all.height; ++q, out += all.pitch) {
          const int64_t cols = q < valid_rows ? valid_cols : 0;
          if (cols > 0) pack_row(in, channel, phase / in.phases_w, phase % in.phases_w, step.row + q, cols, out);
          std::fill(out + cols, out + all.pitch, T(0));
        }
      }
      std::fill(out, packed + (p + 1) * all.plane, T(0));
    }
  });
}

// The nonzeros of each output row as (value, offset into the packed planes).
template <class T>
struct TapList {
  std::vector<int64_t> row_ptr{0};
  std::vector<T> values;
  std::vector<int64_t> offsets;
  int64_t rows() const { return int64_t(row_ptr.size()) - 1; }
};

template <class T, int kVecs>
SIMD_INLINE void tile(const TapList<T>& taps, int64_t row, const T* planes, T* out) {
  Vec<T> acc[kVecs] = {};
  for (int64_t k = taps.row_ptr[row]; k < taps.row_ptr[row + 1]; ++k) {
    const T* source = planes + taps.offsets[k];
    const T value = taps.values[k];
    for (int j = 0; j < kVecs; ++j) acc[j] += value * simd::load(source + j * kLanes<T>);
  }
  for (int j = 0; j < kVecs; ++j) simd::store(out + j * kLanes<T>, acc[j]);
}

template <class T>
SIMD_INLINE void tile_of(int vecs, const TapList<T>& taps, int64_t row, const T* planes, T* out) {
  switch (vecs) {
#define CASE(N) \
  case N:       \
    return tile<T, N>(taps, row, planes, out);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

// Adds the positions [first, first + count) of output row `row` to the image.
template <class T>
SIMD_INLINE void add_positions(const Planes<T>& out, const Steps& all, const Step& step, int64_t row, int64_t first,
                               int64_t count, const T* source) {
  const Image<T>& y = out.image;
  const int64_t a = row % out.per_channel() / out.phases_w, b = row % out.phases_w, c = row / out.per_channel();
  for (int64_t p = first, next; p < first + count; p = next) {
    const int64_t line = p / all.pitch, begin = p % all.pitch;
    next = std::min(first + count, (line + 1) * all.pitch);
    const int64_t i = line / all.height, q = line % all.height;
    const int64_t h = (step.row + q) * out.phases_h + a - out.pad_h;
    if (q >= step.rows || h < 0 || h >= y.height) continue;
    const int64_t end = std::min(begin + (next - p), all.cols);
    T* line_out = y.data + (step.image + i) * y.stride_n + c * y.stride_c + h * y.stride_h;
    const T* in = source + (p - first) - begin;
    if (out.phases_w == 1 && out.pad_w == 0 && y.stride_w == 1) {
      for (int64_t t = begin; t < end; ++t) line_out[t] += in[t];
      continue;
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t w = t * out.phases_w + b - out.pad_w;
      if (w >= 0 && w < y.width) line_out[w * y.stride_w] += in[t];
    }
  }
}

template <class T>
void multiply(const TapList<T>& taps, const Planes<T>& out, const Steps& all, const Step& step, const T* packed,
              const ParallelFor& parallel_for) {
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t positions = step.positions(all);
  const int64_t vecs = ceil_div(positions, kWidth), tiles = ceil_div(vecs, kTileVecs);
  const int64_t blocks = ceil_div(taps.rows(), kRowBlock);
  const int64_t operations = 2 * int64_t(taps.values.size()) * vecs * kWidth;
  const int64_t grain = std::max<int64_t>(1, tiles * blocks * kGrainOps / std::max<int64_t>(1, operations));
  parallel_for(tiles * blocks, grain, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() {
      T buffer[kTileVecs * kWidth];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = item / blocks, first_row = item % blocks * kRowBlock;
        const int64_t v = vecs * t / tiles, count = vecs * (t + 1) / tiles - v;  // equal tiles, no ragged tail
        const int64_t valid = std::min(count * kWidth, positions - v * kWidth);  // the last vector may run past the end
        for (int64_t row = first_row; row < std::min(taps.rows(), first_row + kRowBlock); ++row) {
          if (taps.row_ptr[row] == taps.row_ptr[row + 1]) continue;
          tile_of<T>(int(count), taps, row, packed + v * kWidth, buffer);
          add_positions(out, all, step, row, v * kWidth, valid, buffer);
        }
      }
    });
  });
}

template <class T>
void run(const Planes<const T>& in, const Planes<T>& out, const TapList<T>& taps, const Steps& steps,
         const ParallelFor& parallel_for) {
  std::vector<T> packed(in.count() * steps.plane);
  for (int64_t index = 0; index < steps.count(); ++index) {
    const Step step = step_at(steps, index);
    pack(in, steps, step, steps.height, steps.pitch, packed.data(), parallel_for);
    multiply(taps, out, steps, step, packed.data(), parallel_for);
  }
}

// Where tap `tap` = kh * kernel_w + kw reads: its phase and its distance in phase rows and columns.
struct Tap {
  int64_t phase, down, right;
};
Tap tap_at(const ConvShape& s, int64_t tap) {
  const int64_t h = tap / s.kernel_w * s.dilation_h, w = tap % s.kernel_w * s.dilation_w;
  return {h % s.stride_h * s.stride_w + w % s.stride_w, h / s.stride_h, w / s.stride_w};
}
Tap reach(const ConvShape& s) {
  return {0, (s.kernel_h - 1) * s.dilation_h / s.stride_h, (s.kernel_w - 1) * s.dilation_w / s.stride_w};
}

template <class T>
Planes<const T> input_planes(const Image<const T>& x, const ConvShape& s) {
  return {x, s.stride_h, s.stride_w, s.pad_h, s.pad_w};
}

template <class T>
TapList<T> forward_taps(const Csr<T>& s, const Image<const T>& x, const ConvShape& shape, const Steps& steps) {
  const int64_t kernel = shape.kernel_h * shape.kernel_w, phases = shape.stride_h * shape.stride_w;
  const int64_t group_rows = s.rows / shape.groups, group_channels = x.channels / shape.groups;
  TapList<T> taps;
  taps.values.assign(s.values, s.values ? s.values + s.nnz() : s.values);
  taps.offsets.reserve(s.nnz());
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t first_channel = i / group_rows * group_channels;
    for (int64_t k = s.row_ptr[i]; k < s.row_ptr[i + 1]; ++k) {
      const Tap tap = tap_at(shape, s.col_idx[k] % kernel);
      const int64_t plane = (first_channel + s.col_idx[k] / kernel) * phases + tap.phase;
      taps.offsets.push_back(plane * steps.plane + tap.down * steps.pitch + tap.right);
    }
    taps.row_ptr.push_back(int64_t(taps.offsets.size()));
  }
  return taps;
}

}  // namespace

template <class T>
void sparse_conv2d(const Image<const T>& x, const Csr<T>& s, const Image<T>& y, const ConvShape& shape,
                   const ParallelFor& parallel_for) {
  if (s.nnz() == 0) return;
  const Planes<const T> in = input_planes(x, shape);
  const Tap far = reach(shape);
  const Steps steps(shape.batch, y.height, y.width, far.down, far.right, in.count(), sizeof(T));
  run(in, Planes<T>{y, 1, 1, 0, 0}, forward_taps(s, x, shape, steps), steps, parallel_for);
}

template <class T>
void sparse_conv2d_grad_input(const Image<const T>& dy, const Csr<T>& st, const Image<T>& dx, const ConvShape& shape,
                              const ParallelFor& parallel_for) {
  if (st.nnz() == 0) return;
  const Tap far = reach(shape);
  const int64_t kernel = shape.kernel_h * shape.kernel_w, phases = shape.stride_h * shape.stride_w;
  const Planes<const T> in{dy, 1, 1, far.down, far.right};
  const Planes<T> out{dx, shape.stride_h, shape.stride_w, shape.pad_h, shape.pad_w};
  const Steps steps(shape.batch, dy.height + far.down, dy.width + far.right, far.down, far.right, in.count(),
                    sizeof(T));

  TapList<T> taps;
  for (int64_t c = 0; c < dx.channels; ++c)
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int64_t t = 0; t < kernel; ++t) {
        const Tap tap = tap_at(shape, t);
        if (tap.phase != phase) continue;
        const int64_t shift = (far.down - tap.down) * steps.pitch + (far.right - tap.right);
        for (int64_t k = st.row_ptr[c * kernel + t]; k < st.row_ptr[c * kernel + t + 1]; ++k) {
          taps.values.push_back(st.values[k]);
          taps.offsets.push_back(st.col_idx[k] * steps.plane + shift);
        }
      }
      taps.row_ptr.push_back(int64_t(taps.offsets.size()));
    }
  run(in, out, taps, steps, parallel_for);
}

template <class T>
void sparse_conv2d_grad_values(const Image<const T>& x, const Image<const T>& dy, const Csr<T>& pattern, T* dvalues,
                               const ConvShape& shape, const ParallelFor& parallel_for) {
  std::fill(dvalues, dvalues + pattern.nnz(), T(0));
  if (pattern.nnz() == 0) return;
  const Planes<const T> in = input_planes(x, shape), grad{dy, 1, 1, 0, 0};
  const Tap far = reach(shape);
  const Steps steps(shape.batch, dy.height, dy.width, far.down, far.right, in.count() + grad.count(), sizeof(T));
  const TapList<T> taps =
      forward_taps(Csr<T>{pattern.rows, pattern.cols, nullptr, pattern.row_ptr, pattern.col_idx}, x, shape, steps);

  std::vector<T> packed_x(in.count() * steps.plane), packed_dy(grad.count() * steps.plane);
  for (int64_t index = 0; index < steps.count(); ++index) {
    const Step step = step_at(steps, index);
    const int64_t positions = step.positions(steps);
    pack(in, steps, step, steps.height, steps.pitch, packed_x.data(), parallel_for);
    pack(grad, steps, step, step.rows, dy.width, packed_dy.data(), parallel_for);  // zeros where no output lies
    const int64_t grain = std::max<int64_t>(1, pattern.rows * kGrainOps / (2 * pattern.nnz() * positions));
    parallel_for(pattern.rows, grain, [&](int64_t begin, int64_t end) {
      simd::run([&] SIMD_LAMBDA() {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t k = taps.row_ptr[i]; k < taps.row_ptr[i + 1]; ++k)
            dvalues[k] += simd::dot(packed_dy.data() + i * steps.plane, packed_x.data() + taps.offsets[k], positions);
      });
    });
  }
}

#define INSTANTIATE(T)                                                                                            \
  template void sparse_conv2d(const Image<const T>&, const Csr<T>&, const Image<T>&, const ConvShape&,            \
                              const ParallelFor&);                                                                \
  template void sparse_conv2d_grad_input(const Image<const T>&, const Csr<T>&, const Image<T>&, const ConvShape&, \
                                         const ParallelFor&);                                                     \
  template void sparse_conv2d_grad_values(const Image<const T>&, const Image<const T>&, const Csr<T>&, T*,        \
                                          const ConvShape&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cpu
