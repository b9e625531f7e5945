// Images as vectors whose lanes are patches: lane l of every vector belongs to another image, or to another patch of
// one image. A kernel tap is then a move by whole vectors, aligned whatever the stride, and a map of any size fills the
// lanes. An item of work is one strip of `strip` output rows of every lane's patch: `pack` copies what it reads, with
// zeros outside of the image, `unpack` writes what it made. With channels_last images both are transposes of kLanes
// channels by kLanes pixels; with contiguous ones, of kLanes columns by kLanes patches.
//
// Where all lanes are inside of their images (Inside), and that is nearly everywhere, such a transpose is kLanes loads
// at places that the lanes' starts and one sum give, log2(kLanes) shuffles a vector and kLanes stores: 1.5 to 3 ns a
// vector on a Zen 4, bound by the caches. At the edges every lane is looked at by itself, which takes 4 times as long.
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

// The part of a window, rows [top, bottom) and columns [left, right), that is inside of the image in all lanes.
struct Inside {
  int64_t top = 0, bottom, left = 0, right;

  // Of an image with rows [first_row, end_row) and columns [first_col, end_col).
  template <int kCount>
  SIMD_INLINE Inside(const Origins<kCount>& at, const Window& w, int64_t batch, int64_t first_row, int64_t end_row,
                     int64_t first_col, int64_t end_col)
      : bottom(w.height), right(w.width) {
    for (int l = 0; l < kCount; ++l) {
      top = std::max(top, first_row - at.row[l]);
      bottom = at.image[l] < batch ? std::min(bottom, end_row - at.row[l]) : 0;
      left = std::max(left, first_col - at.col[l]), right = std::min(right, end_col - at.col[l]);
    }
  }
  SIMD_INLINE bool has_row(int64_t row) const { return row >= top && row < bottom; }
  SIMD_INLINE bool has_columns(int64_t col, int64_t count) const { return col >= left && col + count <= right; }
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

// to[i * distance][l] <- from[starts[l] + first + i] for i < count.
template <class T>
SIMD_INLINE void gather(const T* from, const int64_t* starts, int64_t first, T* to, int64_t distance, int64_t count) {
  constexpr int64_t kCount = kLanes<T>;
  Vec<T> r[kCount];
#pragma GCC unroll 16
  for (int l = 0; l < kCount; ++l) r[l] = simd::load(from + (starts[l] + first));
  transpose<T>(r);
  if (count == kCount) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) simd::store(to + i * distance, r[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) simd::store(to + i * distance, r[i]);
  }
}

// to[starts[l] + first + i] <- max(from[i * distance][l], least), and NaN stays.
template <class T>
SIMD_INLINE void scatter(const T* from, int64_t distance, T* to, const int64_t* starts, int64_t first, Vec<T> least) {
  constexpr int64_t kCount = kLanes<T>;
  Vec<T> r[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const Vec<T> sum = simd::load(from + i * distance);
    r[i] = sum < least ? least : sum;
  }
  transpose<T>(r);
#pragma GCC unroll 16
  for (int l = 0; l < kCount; ++l) simd::store(to + (starts[l] + first), r[l]);
}

// Channels [begin, end) of an item's window as out[channel][pixel][lane].
template <class T>
SIMD_INLINE void pack(const Image<const T>& x, const Geometry& g, const Window& w, int64_t item, int64_t begin,
                      int64_t end, T* out) {
  constexpr int64_t kCount = kLanes<T>;
  const Origins<kCount> at(g, w, item);
  const Inside inside(at, w, g.batch, 0, x.height, 0, x.width);
  const int64_t plane = plane_of<T>(w);
  int64_t starts[kCount], furthest = 0;  // of the windows; where they are padded, ahead of their rows
  for (int l = 0; l < kCount; ++l) {
    starts[l] = at.image[l] * x.stride_n + at.row[l] * x.stride_h + at.col[l] * x.stride_w;
    furthest = std::max(furthest, starts[l]);
  }
  if (x.stride_c != 1 && x.stride_w == 1) {
    // Columns outside of the image in all lanes are known where these share them.
    const int64_t low = g.lane_w == 1 ? std::clamp<int64_t>(w.pad_w, 0, w.width) : 0;
    const int64_t high = g.lane_w == 1 ? std::clamp<int64_t>(w.pad_w + x.width, low, w.width) : w.width;
    const int64_t count_x =
        (g.batch - 1) * x.stride_n + (x.channels - 1) * x.stride_c + (x.height - 1) * x.stride_h + x.width;
    // Whether a lane that shares its columns may be loaded beyond its row: there is another one, and it is not stored.
    const auto may_load = [&](int64_t place) { return g.lane_w == 1 && place + kCount <= count_x; };
    for (int64_t c = begin; c < end; ++c)
      for (int64_t h = 0; h < w.height; ++h) {
        const int64_t line = c * x.stride_c + h * x.stride_h;
        const auto slow_column = [&](int l, int64_t col) SIMD_LAMBDA() {
          const int64_t row = at.row[l] + h, place = starts[l] + line + col;
          if (at.image[l] >= g.batch || row < 0 || row >= x.height) return Vec<T>{};
          if (may_load(place)) return simd::load(x.data + place);
          return load_columns(x.data + (place - at.col[l] - col), at.col[l] + col, x.width);
        };
        T* to = out + c * plane + h * w.width * kCount;
        for (int64_t col = 0; col < low; ++col) simd::store(to + col * kCount, Vec<T>{});
        for (int64_t col = low; col < high; col += kCount) {
          const int64_t count = std::min(kCount, high - col);
          if (inside.has_row(h) && (inside.has_columns(col, kCount) || may_load(furthest + line + col))) {
            gather(x.data, starts, line + col, to + col * kCount, kCount, count);
            continue;
          }
          Vec<T> r[kCount];
          for (int l = 0; l < kCount; ++l) r[l] = slow_column(l, col);
          transpose<T>(r);
          for (int64_t i = 0; i < count; ++i) simd::store(to + (col + i) * kCount, r[i]);
        }
        for (int64_t col = high; col < w.width; ++col) simd::store(to + col * kCount, Vec<T>{});
      }
    return;
  }
  for (int64_t h = 0; h < w.height; ++h)
    for (int64_t col = 0; col < w.width; ++col) {
      const int64_t pixel = h * x.stride_h + col * x.stride_w;
      T* to = out + (h * w.width + col) * kCount;
      int64_t c = begin;
      if (x.stride_c == 1 && inside.has_row(h) && inside.has_columns(col, 1))
        for (; c + kCount <= end; c += kCount) gather(x.data, starts, pixel + c, to + c * plane, plane, kCount);
      if (c == end) continue;
      const T* pixels[kCount];
      for (int l = 0; l < kCount; ++l) {
        const int64_t row = at.row[l] + h, column = at.col[l] + col;
        const bool within = at.image[l] < g.batch && row >= 0 && row < x.height && column >= 0 && column < x.width;
        pixels[l] = within ? x.data + (starts[l] + pixel) : nullptr;
      }
      for (; x.stride_c == 1 && c + kCount <= end; c += kCount) {
        Vec<T> r[kCount];
        for (int l = 0; l < kCount; ++l) r[l] = pixels[l] ? simd::load(pixels[l] + c) : Vec<T>{};
        transpose<T>(r);
        for (int i = 0; i < kCount; ++i) simd::store(to + (c + i) * plane, r[i]);
      }
      for (; c < end; ++c)
        for (int l = 0; l < kCount; ++l) to[c * plane + l] = pixels[l] ? pixels[l][c * x.stride_c] : T(0);
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
  const Window window = output_window(g);
  const Origins<kCount> at(g, window, item);
  const Vec<T> least = Vec<T>{} + to.least;
  const auto pixel_row = [&](int l, int64_t h, int64_t a) -> int64_t {
    const int64_t row = at.row[l] + h, pixel = row * to.phases_h + a - to.off_h;
    return at.image[l] < g.batch && row < g.rows && pixel >= 0 && pixel < y.height ? pixel : -1;
  };
  int64_t stop;
  for (int64_t first = begin; first < end; first = stop) {  // one phase after another
    const int64_t phase = first / y.channels, a = phase / to.phases_w, b = phase % to.phases_w;
    stop = std::min(end, (phase + 1) * y.channels);
    const int64_t channel = first - phase * y.channels, count = stop - first;
    const Inside inside(at, window, g.batch, ceil_div(to.off_h - a, to.phases_h),
                        std::min(g.rows, ceil_div(y.height + to.off_h - a, to.phases_h)),
                        ceil_div(to.off_w - b, to.phases_w), ceil_div(y.width + to.off_w - b, to.phases_w));
    int64_t starts[kCount];
    for (int l = 0; l < kCount; ++l)
      starts[l] = at.image[l] * y.stride_n + channel * y.stride_c +
                  (at.row[l] * to.phases_h + a - to.off_h) * y.stride_h +
                  (at.col[l] * to.phases_w + b - to.off_w) * y.stride_w;
    if (y.stride_c != 1 && y.stride_w == 1 && to.phases_w == 1) {
      const int64_t low = g.lane_w == 1 ? std::clamp<int64_t>(to.off_w, 0, g.patch_w) : 0;
      const int64_t high = g.lane_w == 1 ? std::clamp<int64_t>(to.off_w + y.width, low, g.patch_w) : g.patch_w;
      for (int64_t c = 0; c < count; ++c)
        for (int64_t h = 0; h < g.strip; ++h) {
          const T* from = sums + (first + c) * row_size + h * g.patch_w * kCount;
          const int64_t line = c * y.stride_c + h * to.phases_h * y.stride_h;
          const auto copy = [&](int64_t col, int64_t vecs) SIMD_LAMBDA() {
            if (vecs == kCount && inside.has_row(h) && inside.has_columns(col, kCount)) {
              scatter(from + col * kCount, kCount, y.data, starts, line + col, least);
              return;
            }
            Vec<T> r[kCount];
            for (int64_t i = 0; i < kCount; ++i) {
              const Vec<T> sum = i < vecs ? simd::load(from + (col + i) * kCount) : Vec<T>{};
              r[i] = sum < least ? least : sum;
            }
            transpose<T>(r);
            for (int l = 0; l < kCount; ++l) {
              const int64_t row = pixel_row(l, h, a), column = at.col[l] + col - to.off_w;
              const int64_t skip = std::max<int64_t>(0, -column), until = std::min(vecs, y.width - column);
              if (row < 0 || skip >= until) continue;
              if (until - skip == kCount) {
                simd::store(y.data + (starts[l] + line + col), r[l]);
                continue;
              }
              T part[kCount];
              simd::store(part, r[l]);
              copy_few(y.data + (starts[l] + line + col + skip), part + skip, until - skip);
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
        const int64_t pixel = h * to.phases_h * y.stride_h + col * to.phases_w * y.stride_w;
        const T* from = sums + first * row_size + (h * g.patch_w + col) * kCount;
        int64_t c = 0;
        if (y.stride_c == 1 && inside.has_row(h) && inside.has_columns(col, 1))
          for (; c + kCount <= count; c += kCount)
            scatter(from + c * row_size, row_size, y.data, starts, pixel + c, least);
        if (c == count) continue;
        T* pixels[kCount];
        for (int l = 0; l < kCount; ++l) {
          const int64_t row = pixel_row(l, h, a), column = (at.col[l] + col) * to.phases_w + b - to.off_w;
          pixels[l] = row >= 0 && column >= 0 && column < y.width ? y.data + (starts[l] + pixel) : nullptr;
        }
        for (; y.stride_c == 1 && c + kCount <= count; c += kCount) {
          Vec<T> r[kCount];
          for (int i = 0; i < kCount; ++i) {
            const Vec<T> sum = simd::load(from + (c + i) * row_size);
            r[i] = sum < least ? least : sum;
          }
          transpose<T>(r);
          for (int l = 0; l < kCount; ++l)
            if (pixels[l]) simd::store(pixels[l] + c, r[l]);
        }
        for (; c < count; ++c)
          for (int l = 0; l < kCount; ++l)
            if (pixels[l]) {
              const T sum = from[c * row_size + l];
              pixels[l][c * y.stride_c] = sum < to.least ? to.least : sum;
            }
      }
  }
}

}  // namespace cmd_ext::cpu::SIMD_NAMESPACE::lanes
