// Images as vectors whose lanes are patches: lane l of every vector belongs to another image, or to another patch of
// one image. A kernel tap is then a move by whole vectors, aligned whatever the stride, and a map of any size fills the
// lanes. An item of work is one strip of `strip` output rows of every lane's patch: `pack` copies what it reads, with
// zeros outside of the image, `unpack` writes what it made. With channels_last images both are transposes of kLanes
// channels by kLanes pixels; with contiguous ones, of kLanes columns by kLanes patches.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace cmd_ext::cpu::SIMD_NAMESPACE::lanes {

using simd::kLanes;
using simd::Vec;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Which input pixels a position of the output grid reads: rows row * step_h - pad_h + (0 .. span_h - 1), and columns.
struct Reach {
  int64_t step_h, step_w, span_h, span_w, pad_h, pad_w;
};

// The output grid [batch, rows, cols] cut into patches, and those into items and tiles.
struct Geometry {
  int64_t batch, rows, cols;
  Reach reach;
  int64_t lane_n, lane_h, lane_w;   // lanes over images, down and across one image
  int64_t tile_h, tile_w;           // positions whose sums are in registers together
  int64_t strip, patch_h, patch_w;  // rows of an item; size of a patch: multiples of strip and tile_w

  int64_t strips() const { return patch_h / strip; }
  int64_t items() const { return ceil_div(batch, lane_n) * strips(); }
  int64_t positions() const { return strip * patch_w; }
  int64_t in_h() const { return (strip - 1) * reach.step_h + reach.span_h; }
  int64_t in_w() const { return (patch_w - 1) * reach.step_w + reach.span_w; }
};

// A window of an item into an image: `height` x `width` pixels a lane, and where the first is.
struct Window {
  int64_t step_h, step_w, pad_h, pad_w, height, width;
};
inline Window input_window(const Geometry& g) {
  return {g.reach.step_h, g.reach.step_w, g.reach.pad_h, g.reach.pad_w, g.in_h(), g.in_w()};
}
inline Window output_window(const Geometry& g) { return {1, 1, 0, 0, g.strip, g.patch_w}; }

// Distance of two channels of a packed window, in elements: not a multiple of 4 KB, which caches map to one place.
template <class T>
int64_t plane_of(const Window& w) {
  const int64_t plane = w.height * w.width * kLanes<T>;
  return plane * int64_t(sizeof(T)) % 4096 == 0 ? plane + 2 * kLanes<T> : plane;
}

// Where each lane's window begins: its image, and the row and column of its first pixel.
template <int kCount>
struct Origins {
  int64_t image[kCount], row[kCount], col[kCount];

  SIMD_INLINE Origins(const Geometry& g, const Window& w, int64_t item) {
    const int64_t first = item / g.strips() * g.lane_n, strip = item % g.strips() * g.strip;
    for (int l = 0; l < kCount; ++l) {
      const int64_t patch = l % (g.lane_h * g.lane_w);
      image[l] = first + l / (g.lane_h * g.lane_w);
      row[l] = (patch / g.lane_w * g.patch_h + strip) * w.step_h - w.pad_h;
      col[l] = patch % g.lane_w * g.patch_w * w.step_w - w.pad_w;
    }
  }
};

// Lane `lane` of an unpack of two vectors: in each group of lanes, units of the lower (half 0) or the upper half of
// both groups, alternately.
constexpr int unpacked(int lane, int unit, int group, int half, int lanes) {
  const int at = lane % group, place = at / unit;
  return place % 2 * lanes + lane - at + (half * group / unit / 2 + place / 2) * unit + at % unit;
}
template <class T, int kUnit, int kGroup, int kHalf, int... kLane>
SIMD_INLINE Vec<T> unpack(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, unpacked(kLane, kUnit, kGroup, kHalf, kLanes<T>)...);
}
// One of the log2(kLanes) steps of a transpose, on vectors kApart from each other: within blocks of 16 bytes where the
// machine has unpacks of single lanes, by whole blocks from there on.
template <class T, int kApart>
SIMD_INLINE void transpose_step(Vec<T>* r) {
  constexpr int kBlock = 16 / sizeof(T);
  constexpr int kUnit = kApart < kBlock ? 1 : kApart, kGroup = kApart < kBlock ? kBlock : 2 * kApart;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kApart) continue;
    const Vec<T> a = r[i], b = r[i + kApart];
    r[i] = unpack<T, kUnit, kGroup, 0>(a, b, lanes);
    r[i + kApart] = unpack<T, kUnit, kGroup, 1>(a, b, lanes);
  }
}
// r [kLanes][kLanes] transposed in place.
template <class T>
SIMD_INLINE void transpose(Vec<T>* r) {
  if constexpr (sizeof(T) == 4) transpose_step<T, 2>(r);
  transpose_step<T, 1>(r);
  transpose_step<T, 16 / sizeof(T)>(r);
  if constexpr (sizeof(Vec<T>) == 64) transpose_step<T, 32 / sizeof(T)>(r);
}

// Fewer than kLanes elements, in moves of fixed size: a loop over single ones becomes a call of memcpy.
template <class T>
SIMD_INLINE void copy_few(T* to, const T* from, int64_t count) {
  const auto move = [&](auto size) SIMD_LAMBDA() {
    constexpr int64_t kSize = decltype(size)::value;
    if (!(count & kSize)) return;
    std::memcpy(to, from, kSize * sizeof(T));
    to += kSize, from += kSize;
  };
  if constexpr (kLanes<T> > 8) move(std::integral_constant<int64_t, 8>{});
  if constexpr (kLanes<T> > 4) move(std::integral_constant<int64_t, 4>{});
  move(std::integral_constant<int64_t, 2>{});
  move(std::integral_constant<int64_t, 1>{});
}

// kLanes pixels of a row from column `col` on, zeros outside of the image.
template <class T>
SIMD_INLINE Vec<T> load_columns(const T* row, int64_t col, int64_t width) {
  constexpr int64_t kCount = kLanes<T>;
  if (col + kCount <= 0 || col >= width) return Vec<T>{};
  if (col >= 0 && col + kCount <= width) return simd::load(row + col);
  T part[3 * kCount] = {};
  if (width >= kCount) {  // the vector of the row that is nearest, moved: faster than single pixels
    const int64_t near = std::clamp<int64_t>(col, 0, width - kCount);
    simd::store(part + kCount, simd::load(row + near));
    return simd::load(part + kCount + (col - near));
  }
  const int64_t low = std::max<int64_t>(0, -col);
  copy_few(part + low, row + col + low, std::min(kCount, width - col) - low);
  return simd::load(part);
}

// Channels [begin, end) of an item's window as out[channel][pixel][lane].
template <class T>
SIMD_INLINE void pack(const Image<const T>& x, const Geometry& g, const Window& w, int64_t item, int64_t begin,
                      int64_t end, T* out) {
  constexpr int64_t kCount = kLanes<T>;
  const Origins<kCount> at(g, w, item);
  const int64_t plane = plane_of<T>(w);
  if (x.stride_c != 1 && x.stride_w == 1) {
    // Columns outside of the image in all lanes are known where these share them.
    const int64_t low = g.lane_w == 1 ? std::clamp<int64_t>(w.pad_w, 0, w.width) : 0;
    const int64_t high = g.lane_w == 1 ? std::clamp<int64_t>(w.pad_w + x.width, low, w.width) : w.width;
    const T* last = x.data + (g.batch - 1) * x.stride_n + (x.channels - 1) * x.stride_c + (x.height - 1) * x.stride_h +
                    x.width;  // of the whole tensor; behind a row there is another one
    for (int64_t c = begin; c < end; ++c)
      for (int64_t h = 0; h < w.height; ++h) {
        const T* rows[kCount];
        for (int l = 0; l < kCount; ++l) {
          const int64_t row = at.row[l] + h;
          const bool inside = at.image[l] < g.batch && row >= 0 && row < x.height;
          rows[l] = inside ? x.data + at.image[l] * x.stride_n + c * x.stride_c + row * x.stride_h : nullptr;
        }
        T* line = out + c * plane + h * w.width * kCount;
        for (int64_t col = 0; col < low; ++col) simd::store(line + col * kCount, Vec<T>{});
        for (int64_t col = low; col < high; col += kCount) {
          const int64_t count = std::min(kCount, high - col);
          Vec<T> r[kCount];
          for (int l = 0; l < kCount; ++l) {
            const int64_t column = at.col[l] + col;
            if (!rows[l])
              r[l] = Vec<T>{};
            else if (g.lane_w == 1 && last - rows[l] >= column + kCount)
              r[l] = simd::load(rows[l] + column);  // what is beyond the row is not stored
            else
              r[l] = load_columns(rows[l], column, x.width);
          }
          transpose<T>(r);
          for (int64_t i = 0; i < count; ++i) simd::store(line + (col + i) * kCount, r[i]);
        }
        for (int64_t col = high; col < w.width; ++col) simd::store(line + col * kCount, Vec<T>{});
      }
    return;
  }
  for (int64_t h = 0; h < w.height; ++h)
    for (int64_t col = 0; col < w.width; ++col) {
      const T* pixels[kCount];
      for (int l = 0; l < kCount; ++l) {
        const int64_t row = at.row[l] + h, column = at.col[l] + col;
        const bool inside = at.image[l] < g.batch && row >= 0 && row < x.height && column >= 0 && column < x.width;
        pixels[l] = inside ? x.data + at.image[l] * x.stride_n + row * x.stride_h + column * x.stride_w : nullptr;
      }
      T* target = out + (h * w.width + col) * kCount;
      int64_t c = begin;
      for (; x.stride_c == 1 && c + kCount <= end; c += kCount) {
        Vec<T> r[kCount];
        for (int l = 0; l < kCount; ++l) r[l] = pixels[l] ? simd::load(pixels[l] + c) : Vec<T>{};
        transpose<T>(r);
        for (int i = 0; i < kCount; ++i) simd::store(target + (c + i) * plane, r[i]);
      }
      for (; c < end; ++c)
        for (int l = 0; l < kCount; ++l) target[c * plane + l] = pixels[l] ? pixels[l][c * x.stride_c] : T(0);
    }
}

// The image that a grid of rows is written to: row r of the grid is channel r % channels of phase r / channels, whose
// position (h, w) is pixel (h * phases_h + phase / phases_w - off_h, ...). What is below `least` becomes it.
template <class T>
struct Target {
  Image<T> image;
  int64_t phases_h, phases_w, off_h, off_w;
  T least;  // 0: a ReLU; -infinity: nothing. NaN stays.
};

// Rows [begin, end) of an item, sums[row][position][lane], to the image; what lies outside of it is left out.
template <class T>
SIMD_INLINE void unpack(const T* sums, int64_t row_size, const Geometry& g, const Target<T>& to, int64_t item,
                        int64_t begin, int64_t end) {
  constexpr int64_t kCount = kLanes<T>;
  const Image<T>& y = to.image;
  const Origins<kCount> at(g, output_window(g), item);
  const Vec<T> least = Vec<T>{} + to.least;
  const auto sum_at = [&](const T* from) SIMD_LAMBDA() {
    const Vec<T> sum = simd::load(from);
    return sum < least ? least : sum;
  };
  const auto pixel_row = [&](int l, int64_t h, int64_t a) -> int64_t {
    const int64_t row = at.row[l] + h, pixel = row * to.phases_h + a - to.off_h;
    return at.image[l] < g.batch && row < g.rows && pixel >= 0 && pixel < y.height ? pixel : -1;
  };
  int64_t stop;
  for (int64_t first = begin; first < end; first = stop) {  // one phase after another
    const int64_t phase = first / y.channels, a = phase / to.phases_w, b = phase % to.phases_w;
    stop = std::min(end, (phase + 1) * y.channels);
    const int64_t channel = first - phase * y.channels, count = stop - first;
    if (y.stride_c != 1 && y.stride_w == 1 && to.phases_w == 1) {
      const int64_t low = g.lane_w == 1 ? std::clamp<int64_t>(to.off_w, 0, g.patch_w) : 0;
      const int64_t high = g.lane_w == 1 ? std::clamp<int64_t>(to.off_w + y.width, low, g.patch_w) : g.patch_w;
      for (int64_t c = 0; c < count; ++c)
        for (int64_t h = 0; h < g.strip; ++h) {
          const T* line = sums + (first + c) * row_size + h * g.patch_w * kCount;
          const auto copy = [&](int64_t col, int64_t vecs) SIMD_LAMBDA() {
            Vec<T> r[kCount];
            for (int64_t i = 0; i < kCount; ++i) r[i] = i < vecs ? sum_at(line + (col + i) * kCount) : Vec<T>{};
            transpose<T>(r);
            for (int l = 0; l < kCount; ++l) {
              const int64_t row = pixel_row(l, h, a), column = at.col[l] + col - to.off_w;
              const int64_t from = std::max<int64_t>(0, -column), until = std::min(vecs, y.width - column);
              if (row < 0 || from >= until) continue;
              T* target = y.data + at.image[l] * y.stride_n + (channel + c) * y.stride_c + row * y.stride_h + column;
              if (until - from == kCount) {
                simd::store(target, r[l]);
                continue;
              }
              T part[kCount];
              simd::store(part, r[l]);
              copy_few(target + from, part + from, until - from);
            }
          };
          for (int64_t col = low; col < high; col += kCount)
            if (col + kCount <= high)
              copy(col, kCount);
            else if (kCount <= high - low)
              copy(high - kCount, kCount);
            else
              copy(col, high - col);
        }
      continue;
    }
    for (int64_t h = 0; h < g.strip; ++h)
      for (int64_t col = 0; col < g.patch_w; ++col) {
        T* pixels[kCount];
        for (int l = 0; l < kCount; ++l) {
          const int64_t row = pixel_row(l, h, a), column = (at.col[l] + col) * to.phases_w + b - to.off_w;
          const bool inside = row >= 0 && column >= 0 && column < y.width;
          pixels[l] = inside ? y.data + at.image[l] * y.stride_n + row * y.stride_h + column * y.stride_w : nullptr;
        }
        const T* source = sums + first * row_size + (h * g.patch_w + col) * kCount;
        int64_t c = 0;
        for (; y.stride_c == 1 && c + kCount <= count; c += kCount) {
          Vec<T> r[kCount];
          for (int i = 0; i < kCount; ++i) r[i] = sum_at(source + (c + i) * row_size);
          transpose<T>(r);
          for (int l = 0; l < kCount; ++l)
            if (pixels[l]) simd::store(pixels[l] + channel + c, r[l]);
        }
        for (; c < count; ++c)
          for (int l = 0; l < kCount; ++l)
            if (pixels[l]) {
              const T sum = source[c * row_size + l];
              pixels[l][(channel + c) * y.stride_c] = sum < to.least ? to.least : sum;
            }
      }
  }
}

}  // namespace cmd_ext::cpu::SIMD_NAMESPACE::lanes
