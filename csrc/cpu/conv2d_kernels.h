// Convolution with the kernel U V + S in one pass, its gradient for x in one, and those for its weights in one.
//
//     y = bias + U (V * x) + S * x          dU = dy . z, z = V * x                  dvalues = dy . x on the support
//     dx = V^T * dz + S^T * dy              dV = dz . x, dz = U^T dy                (a . b: sums of products over
//     pixels)
//
// All run on packed strips whose vector lanes are patches or images (lanes.h), so that every tap is an aligned move.
// Per item: pack the strip; for each block of channels (what a tile touches of it fits L1) the rank products of V and
// the nonzeros of S; then U; unpack. Neither the output nor V * x goes to memory in between.
//   S: a tile of tile_h x tile_w positions of one row of sums stays in up to 14 registers; a nonzero costs a broadcast
//      and one FMA with a memory operand per position: the FMA units' peak while the tile hits L1. About 7 ns a row,
//      block and tile for loading and storing the sums, hence large tiles.
//   U and V: 4 rows x 3 positions in 12 registers, over channels and taps; weights packed in that order.
//   dvalues: eight nonzeros at a time, each with a register of sums: a vector of dy is loaded once for their eight FMAs
//      with memory operands, at all positions of the strip; the registers are transposed and added into eight sums.
//   dU and dV: eight registers of sums as well, of 4 rows of dy (dz) and 2 columns of z (x); z and dz by the dense
//   products.
// The gradient for x is the same convolution of dy, with one group of output rows per phase of the stride; there the
// product with U^T comes first, on all of the packed strip. Operations 2 (nnz + rank products) positions; bytes: x and
// y once each, packed 2.5 times. Everything that depends on weights and sizes alone is a plan (a flat block of memory
// that can be kept between calls). Results do not depend on the number of threads.
//
// Compiled for vectors of 32 bytes and, for AVX-512 (conv2d_avx512.cpp), of 64: there S has tiles of up to 28 of the 32
// registers, dvalues two registers of sums a nonzero, dU and dV sixteen sums of 8 rows, and a block half the channels,
// so that it still fits L1. On Zen 4, whose FMAs of 64 bytes take twice those of 32, that copy is no faster at 56x56
// and slower at 14x14 and below, so isa.h leaves it to CPUs with full-width units, where its speed was not measured.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "conv2d_plan.h"

namespace cmd_ext::cpu {

// The functions of kernels.h, compiled for vectors of one size.
template <class T>
struct ConvKernels {
  decltype(&cpu::plan_conv2d<T>) plan_conv2d;
  decltype(&cpu::read_plan) read_plan;
  decltype(&cpu::run_plan<T>) run_plan;
  decltype(&cpu::lrs_conv2d<T>) lrs_conv2d;
  decltype(&cpu::lrs_conv2d_grad_input<T>) lrs_conv2d_grad_input;
  decltype(&cpu::lrs_conv2d_grad_weights<T>) lrs_conv2d_grad_weights;
};

namespace SIMD_NAMESPACE {
namespace {

using namespace conv;
using lanes::Target;
using lanes::Vec;

constexpr int64_t kAtOnce = 3;  // positions of the dense products
constexpr int64_t kUnits = 64;  // pieces that the rows of one item are dealt in

template <class T, int kStep, size_t kIndex, class Visit>
SIMD_INLINE void try_tile(const Geometry& g, const Visit& visit) {
  constexpr TileShape tile = kTiles[kIndex];
  if constexpr (has_tile(tile, sizeof(T), kStep))
    if (g.tile_h == tile.height && g.tile_w == tile.width)
      visit(std::integral_constant<int, tile.height>{}, std::integral_constant<int, tile.width>{},
            std::integral_constant<int, kStep>{});
}
template <class T, int kStep, class Visit, size_t... kIndex>
SIMD_INLINE void try_tiles(const Geometry& g, const Visit& visit, std::index_sequence<kIndex...>) {
  (try_tile<T, kStep, kIndex>(g, visit), ...);
}
// Calls visit with the geometry's tile as constants: height, width, pixels between its columns.
template <class T, class Visit>
SIMD_INLINE void with_tile(const Geometry& g, const Visit& visit) {
  constexpr auto all = std::make_index_sequence<std::size(kTiles)>{};
  g.reach.step_w == 2 ? try_tiles<T, 2>(g, visit, all) : try_tiles<T, 1>(g, visit, all);
}

// A tile of vectors in registers: loaded from and stored to lines of positions, `step` vectors apart.
template <class T, int kHeight, int kWidth>
struct Tile {
  Vec<T> at[kHeight * kWidth];

  SIMD_INLINE void load(const T* from, int64_t line) {
#pragma GCC unroll 32
    for (int h = 0; h < kHeight; ++h, from = simd::opaque(from + line))
#pragma GCC unroll 32
      for (int w = 0; w < kWidth; ++w) at[h * kWidth + w] = simd::load(from + w * kLanes<T>);
  }
  SIMD_INLINE void store(T* to, int64_t line) const {
#pragma GCC unroll 32
    for (int h = 0; h < kHeight; ++h, to = simd::opaque(to + line))
#pragma GCC unroll 32
      for (int w = 0; w < kWidth; ++w) simd::store(to + w * kLanes<T>, at[h * kWidth + w]);
  }
  // this += value * x
  template <int kStep>
  SIMD_INLINE void add_product(T value, const T* x, int64_t line) {
#pragma GCC unroll 32
    for (int h = 0; h < kHeight; ++h, x = simd::opaque(x + line))
#pragma GCC unroll 32
      for (int w = 0; w < kWidth; ++w) at[h * kWidth + w] += value * simd::load(x + w * kStep * kLanes<T>);
  }
};

// sums [rows begin .. end) += S * in, for one channel block and tile.
template <class T, int kHeight, int kWidth, int kStep>
SIMD_INLINE void sparse_tile(const Entry<T>* entries, const uint32_t* row_ptr, int64_t begin, int64_t end, const T* in,
                             int64_t in_line, T* sums, int64_t row_size, int64_t line) {
  Tile<T, kHeight, kWidth> tile;
  for (int64_t row = begin; row < end; ++row) {
    const Entry<T>*entry = entries + row_ptr[row], *last = entries + row_ptr[row + 1];
    if (entry == last) continue;
    tile.load(sums + row * row_size, line);
    for (; entry < last; ++entry)
      tile.template add_product<kStep>(entry->value, simd::opaque(in + entry->offset), in_line);
    tile.store(sums + row * row_size, line);
  }
}

template <class T, int kCount>
SIMD_INLINE Vec<T> pairwise_sum(const Vec<T>* r) {
  if constexpr (kCount == 1)
    return r[0];
  else
    return pairwise_sum<T, kCount / 2>(r) + pairwise_sum<T, kCount / 2>(r + kCount / 2);
}
// The sums of the lanes of kLanes vectors.
template <class T>
SIMD_INLINE Vec<T> lane_sums(Vec<T>* r) {
  lanes::transpose<T>(r);
  return pairwise_sum<T, kLanes<T>>(r);
}

// Nonzeros whose products are added up together: as many as have room for their addresses.
template <class T>
constexpr int kEntries = std::min(kLanes<T>, 8);

// values [i] += the sum over positions and lanes of dy * x at entries[i], for kCount entries. A vector of dy serves
// them all; few entries get several chains of sums each, for the FMAs of a chain wait for each other.
template <class T, int kCount>
SIMD_INLINE void sampled_products(const Entry<T>* entries, const T* in, const int32_t* places, int64_t positions,
                                  const T* dy, T* values) {
  constexpr int kWidth = kLanes<T>;
  constexpr int kChains = (kCount >= 5 ? 1 : kCount >= 3 ? 2 : 4) * CMD_EXT_VECTOR_BYTES / 32;  // 32 registers of 64
  const T* source[kCount];
  Vec<T> acc[kChains][kWidth] = {};
#pragma GCC unroll 8
  for (int e = 0; e < kCount; ++e) source[e] = in + entries[e].offset;
  int64_t i = 0;
  for (; i + kChains <= positions; i += kChains)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      const Vec<T> grad = simd::load(dy + (i + c) * kWidth);
      const int64_t place = places[i + c];
#pragma GCC unroll 8
      for (int e = 0; e < kCount; ++e) acc[c][e] += grad * simd::load(source[e] + place);
    }
  for (; i < positions; ++i)
#pragma GCC unroll 8
    for (int e = 0; e < kCount; ++e) acc[0][e] += simd::load(dy + i * kWidth) * simd::load(source[e] + places[i]);
#pragma GCC unroll 8
  for (int c = 1; c < kChains; ++c)
#pragma GCC unroll 8
    for (int e = 0; e < kCount; ++e) acc[0][e] += acc[c][e];
  const Vec<T> total = lane_sums<T>(acc[0]);
  if constexpr (kCount == kWidth) return simd::store(values, simd::load(values) + total);
#pragma GCC unroll 8
  for (int e = 0; e < kCount; ++e) values[e] += total[e];
}

// The same for entries [begin, end).
template <class T, size_t... kRest>
SIMD_INLINE void sampled_row(const Entry<T>* entries, int64_t begin, int64_t end, const T* in, const int32_t* places,
                             int64_t positions, const T* dy, T* values, std::index_sequence<kRest...>) {
  constexpr int kWidth = kEntries<T>;
  for (; begin + kWidth <= end; begin += kWidth)
    sampled_products<T, kWidth>(entries + begin, in, places, positions, dy, values + begin);
  const auto rest = [&](auto count) SIMD_LAMBDA() {
    if (end - begin == count) sampled_products<T, count>(entries + begin, in, places, positions, dy, values + begin);
  };
  (rest(std::integral_constant<int, kRest + 1>{}), ...);
}

// A gradient [rows, columns] whose sums lie in blocks of kLanes / 2 rows by 2 columns, row by row; incomplete blocks at
// the ends have all kLanes numbers, of which some mean nothing.
template <class T>
struct Blocked {
  static constexpr int64_t kRows = kLanes<T> / 2;
  int64_t rows;
  std::vector<int32_t> columns;  // where in the packed input they are

  int64_t row_blocks() const { return ceil_div(rows, kRows); }
  int64_t row_size() const { return round_up(int64_t(columns.size()), 2) * kRows; }
  int64_t size() const { return row_blocks() * row_size(); }
  // The place of (row, column).
  int64_t at(int64_t row, int64_t column) const {
    return row / kRows * row_size() + column / 2 * kLanes<T> + row % kRows * 2 + column % 2;
  }
};

// sums [kLanes] += the sums over positions and lanes of rows of dy times x at two columns.
template <class T>
SIMD_INLINE void block_products(const T* const* dy, const T* const* x, const int32_t* places, int64_t positions,
                                T* sums) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> acc[kWidth] = {};
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t place = places[p];
    const Vec<T> left = simd::load(x[0] + place), right = simd::load(x[1] + place);
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      const Vec<T> grad = simd::load(dy[i] + p * kWidth);
      acc[2 * i] += grad * left;
      acc[2 * i + 1] += grad * right;
    }
  }
  simd::store(sums, simd::load(sums) + lane_sums<T>(acc));
}

// Row blocks [begin, end) of sums += dy . in, summed over positions and lanes; dy [rows][positions].
template <class T>
SIMD_INLINE void dense_gradient(const Blocked<T>& grad, int64_t begin, int64_t end, const T* dy, int64_t dy_row,
                                const T* in, const int32_t* places, int64_t positions, T* sums) {
  const int64_t count = int64_t(grad.columns.size());
  for (int64_t block = begin; block < end; ++block) {
    const T* rows[grad.kRows];
    for (int64_t i = 0; i < grad.kRows; ++i) rows[i] = dy + std::min(block * grad.kRows + i, grad.rows - 1) * dy_row;
    T* out = sums + block * grad.row_size();
    for (int64_t j = 0; j < count; j += 2, out += kLanes<T>) {
      const T* columns[2] = {in + grad.columns[j], in + grad.columns[std::min(j + 1, count - 1)]};
      block_products(rows, columns, places, positions, out);
    }
  }
}

// out [kRows][kPositions] += weights [channels][taps][kRows] * in at the taps; kTaps 0: any number of them.
template <class T, int kRows, int kPositions, int kTaps>
SIMD_INLINE void dense_tile(const T* in, const int64_t* places, int64_t plane, int64_t channels, const int32_t* taps,
                            int64_t tap_count, const T* weights, T* out, int64_t row_size) {
  Vec<T> acc[kRows * kPositions];
  const T* source[kPositions];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kPositions; ++i)
    acc[i] = simd::load(out + i / kPositions * row_size + i % kPositions * kLanes<T>);
  const auto add = [&](int64_t tap) SIMD_LAMBDA() {
    Vec<T> x[kPositions];
#pragma GCC unroll 4
    for (int j = 0; j < kPositions; ++j) x[j] = simd::load(source[j] + tap);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) acc[i * kPositions + j] += weights[i] * x[j];
    weights += kRows;
  };
#pragma GCC unroll 4
  for (int j = 0; j < kPositions; ++j) source[j] = in + places[j] + (kTaps == 1 ? taps[0] : 0);
  for (int64_t c = 0; c < channels; ++c) {
    if constexpr (kTaps == 1)
      add(0);
    else
      for (int64_t t = 0; t < tap_count; ++t) add(taps[t]);
#pragma GCC unroll 4
    for (int j = 0; j < kPositions; ++j) source[j] += plane;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kPositions; ++i)
    simd::store(out + i / kPositions * row_size + i % kPositions * kLanes<T>, acc[i]);
}

// One quad of rows of a part at all positions, over channels [begin, end) of the input.
template <class T, int kRows, int kTaps>
SIMD_INLINE void dense_rows(const Plan<T>& plan, const Part& part, int64_t quad, int64_t begin, int64_t end,
                            const T* in, int64_t plane, const int32_t* places, int64_t positions, T* out,
                            int64_t row_size) {
  const T* weights =
      plan.weights + part.weight + (quad * kQuad * part.channels + (begin - part.channel) * kRows) * part.taps;
  T* rows = out + (part.row + quad * kQuad) * row_size;
  for (int64_t i = 0; i < positions;) {
    const int64_t left = positions - i, count = left >= kAtOnce && left != 4 ? 3 : left >= 2 ? 2 : 1;
    int64_t at[kAtOnce];
    for (int64_t j = 0; j < count; ++j) at[j] = places ? places[i + j] : (i + j) * kLanes<T>;
    const T* source = in + begin * plane;
    const int32_t* taps = plan.taps + part.tap;
    T* target = rows + i * kLanes<T>;
    const int64_t channels = end - begin;
    if (count == 3)
      dense_tile<T, kRows, 3, kTaps>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
    if (count == 2)
      dense_tile<T, kRows, 2, kTaps>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
    if (count == 1)
      dense_tile<T, kRows, 1, kTaps>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
    i += count;
  }
}

// Quads [first, last) of the part that meet channels [begin, end).
template <class T>
SIMD_INLINE void dense_part(const Plan<T>& plan, const Part& part, int64_t first, int64_t last, int64_t begin,
                            int64_t end, const T* in, int64_t plane, const int32_t* places, int64_t positions, T* out,
                            int64_t row_size) {
  begin = std::max(begin, part.channel), end = std::min(end, part.channel + part.channels);
  if (begin >= end || part.taps == 0) return;
  const auto multiply = [&](auto rows, int64_t quad) SIMD_LAMBDA() {
    if (part.taps == 1)
      dense_rows<T, rows, 1>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
    else
      dense_rows<T, rows, 0>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
  };
  for (int64_t quad = first; quad < last; ++quad) {
    const int64_t rows = std::min(kQuad, part.rows - quad * kQuad);
    if (rows == 4) multiply(std::integral_constant<int, 4>{}, quad);
    if (rows == 3) multiply(std::integral_constant<int, 3>{}, quad);
    if (rows == 2) multiply(std::integral_constant<int, 2>{}, quad);
    if (rows == 1) multiply(std::integral_constant<int, 1>{}, quad);
  }
}

// Memory of one item: the packed input, the middle (for gradients of the weights: and its gradient), the sums.
template <class T>
struct Buffers {
  int64_t plane, row_size, middle_size;
  Scratch<T> memory;
  T *in, *middle, *sums;

  explicit Buffers(const Header& h, int64_t middles = 1)
      : plane(lanes::plane_of<T>(input_window(h.geometry))),
        row_size(lanes::plane_of<T>(output_window(h.geometry))),
        middle_size(h.middle_on_input ? plane : row_size),
        memory(Slot::strip, size_of_in(h) + size_of_sums(h) + middles * h.ranks * middle_size),
        in(memory.get()),
        middle(in + size_of_in(h) + size_of_sums(h)),
        sums(in + size_of_in(h)) {}
  // With the sums and the middle of others, for threads that share an item.
  Buffers(const Header& h, const Buffers& others)
      : plane(others.plane),
        row_size(others.row_size),
        middle_size(others.middle_size),
        memory(Slot::input, size_of_in(h)),
        in(memory.get()),
        middle(others.middle),
        sums(others.sums) {}

 private:
  int64_t size_of_in(const Header& h) const { return round_up(h.channels * plane, 16); }
  int64_t size_of_sums(const Header& h) const { return round_up(h.rows * row_size, 16); }
};

// The middle's quads and the sums' rows [begin, end) of kUnits.
template <class T>
SIMD_INLINE void multiply_input(const Plan<T>& plan, const Buffers<T>& b, const T* bias, int64_t quad_begin,
                                int64_t quad_end, int64_t row_begin, int64_t row_end) {
  const Header& h = *plan.head;
  const Geometry& g = h.geometry;
  const int64_t middle_positions = h.middle_on_input ? g.in_h() * g.in_w() : g.positions();
  for (int64_t row = row_begin; row < row_end; ++row)
    std::fill_n(b.sums + row * b.row_size, b.row_size, bias ? bias[row] : T(0));
  for (int64_t block = 0; block < h.blocks; ++block) {
    const int64_t channel = block * h.block, last = std::min(h.channels, channel + h.block);
    for (int64_t p = 0, before = 0; p < h.parts_in; ++p) {  // quads are counted through all parts
      const Part& part = plan.parts[p];
      const int64_t quads = ceil_div(part.rows, kQuad);
      const int64_t first = std::clamp<int64_t>(quad_begin - before, 0, quads);
      const int64_t stop = std::clamp<int64_t>(quad_end - before, 0, quads);
      if (block == 0)
        for (int64_t row = first * kQuad; row < std::min(part.rows, stop * kQuad); ++row)
          std::fill_n(b.middle + (part.row + row) * b.middle_size, b.middle_size, T(0));
      dense_part(plan, part, first, stop, channel, last, b.in, b.plane, h.middle_on_input ? nullptr : plan.places,
                 middle_positions, b.middle, b.middle_size);
      before += quads;
    }
    const uint32_t* row_ptr = plan.row_ptr + block * h.rows;
    if (row_begin == row_end || row_ptr[row_begin] == row_ptr[row_end]) continue;
    const T* in = b.in + channel * b.plane;
    const int64_t in_line = g.reach.step_h * g.in_w() * kLanes<T>, line = g.patch_w * kLanes<T>;
    with_tile<T>(g, [&](auto height, auto width, auto step) SIMD_LAMBDA() {
      for (int64_t top = 0; top < g.strip; top += height)
        for (int64_t left = 0; left < g.patch_w; left += width)
          sparse_tile<T, height, width, step>(plan.entries, row_ptr, row_begin, row_end,
                                              in + top * in_line + left * g.reach.step_w * kLanes<T>, in_line,
                                              b.sums + top * line + left * kLanes<T>, b.row_size, line);
    });
  }
}

template <class T>
SIMD_INLINE void multiply_middle(const Plan<T>& plan, const Buffers<T>& b, int64_t row_begin, int64_t row_end) {
  const Header& h = *plan.head;
  for (int64_t p = h.parts_in; p < h.parts_in + h.parts_out; ++p) {
    const Part& part = plan.parts[p];
    const int64_t quads = ceil_div(part.rows, kQuad);
    // Rows are dealt in whole quads of a part (see rows_at).
    const int64_t first = std::clamp<int64_t>(ceil_div(row_begin - part.row, kQuad), 0, quads);
    const int64_t stop = std::clamp<int64_t>(ceil_div(row_end - part.row, kQuad), 0, quads);
    dense_part(plan, part, first, stop, 0, h.ranks, b.middle, b.middle_size, h.middle_on_input ? plan.places : nullptr,
               h.geometry.positions(), b.sums, b.row_size);
  }
}

// out = bias, or its positive part: all that is left of a layer without branches, which never reads its input.
template <class T>
void fill(const Image<T>& out, int64_t batch, const T* bias, bool relu, const ParallelFor& parallel_for) {
  std::vector<T> line(out.channels, T(0));  // the values of a pixel, and then of all in a row
  if (bias) std::copy_n(bias, out.channels, line.begin());
  if (relu) std::replace_if(line.begin(), line.end(), [](T value) { return value < 0; }, T(0));
  const bool by_rows = out.stride_c == 1 && out.stride_w == out.channels;
  if (by_rows) {
    line.resize(out.width * out.channels);
    for (size_t i = out.channels; i < line.size(); ++i) line[i] = line[i - out.channels];
  }
  const int64_t count = by_rows ? out.height : out.channels, size = out.channels * out.height * out.width / count;
  parallel_for(batch * count, std::max<int64_t>(1, (1 << 18) / size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* to = out.data + i / count * out.stride_n + i % count * (by_rows ? out.stride_h : out.stride_c);
      if (by_rows) {
        std::copy(line.begin(), line.end(), to);
        continue;
      }
      for (int64_t row = 0; row < out.height; ++row, to += out.stride_h) {
        if (out.stride_w == 1)
          std::fill_n(to, out.width, line[i % count]);
        else
          for (int64_t col = 0; col < out.width; ++col) to[col * out.stride_w] = line[i % count];
      }
    }
  });
}

// Runs a plan: out = bias + (U V + S) * in, as far as the plan has these branches; with `relu`, its positive part.
template <class T>
void run(const Plan<T>& plan, const Image<const T>& in, const T* bias, bool relu, const Image<T>& out,
         const ParallelFor& parallel_for) {
  const Header& h = *plan.head;
  const Geometry& g = h.geometry;
  if (h.ranks == 0 && h.nnz == 0) return fill(out, g.batch, bias, relu, parallel_for);
  const Target<T> target{out,     h.phases_h, h.phases_w,
                         h.off_h, h.off_w,    relu ? T(0) : -std::numeric_limits<T>::infinity()};
  const lanes::Window window = input_window(g);
  int64_t quads = 0, aligned = 1;  // rows can be dealt in eights where no part begins within one
  for (int64_t p = 0; p < h.parts_in; ++p) quads += ceil_div(plan.parts[p].rows, kQuad);
  for (int64_t p = h.parts_in; p < h.parts_in + h.parts_out; ++p) aligned &= plan.parts[p].row % kQuad == 0;
  if (!h.shared || !aligned) {
    parallel_for(g.items(), 1, [&](int64_t begin, int64_t end) {
      const Buffers<T> buffers(h);
      simd::run([&] SIMD_LAMBDA() {
        for (int64_t item = begin; item < end; ++item) {
          lanes::pack(in, g, window, item, 0, h.channels, buffers.in);
          multiply_input(plan, buffers, bias, 0, quads, 0, h.rows);
          multiply_middle(plan, buffers, 0, h.rows);
          lanes::unpack(buffers.sums, buffers.row_size, g, target, item, 0, h.rows);
        }
      });
    });
    return;
  }
  // Few items: all threads work on the rows of each. Every thread packs the input for itself: fetching what another one
  // packed, line by line from its cache, takes longer.
  const Buffers<T> buffers(h);
  const auto rows_at = [&](int64_t unit) { return unit == kUnits ? h.rows : h.rows * unit / kUnits / 8 * 8; };
  const auto quads_at = [&](int64_t unit) { return quads * unit / kUnits; };
  for (int64_t item = 0; item < g.items(); ++item) {
    parallel_for(kUnits, 1, [&](int64_t begin, int64_t end) {
      const Buffers<T> own(h, buffers);
      simd::run([&] SIMD_LAMBDA() {
        lanes::pack(in, g, window, item, 0, h.channels, own.in);
        multiply_input(plan, own, bias, quads_at(begin), quads_at(end), rows_at(begin), rows_at(end));
      });
    });
    parallel_for(kUnits, 1, [&](int64_t begin, int64_t end) {
      simd::run([&] SIMD_LAMBDA() {
        multiply_middle(plan, buffers, rows_at(begin), rows_at(end));
        lanes::unpack(buffers.sums, buffers.row_size, g, target, item, rows_at(begin), rows_at(end));
      });
    });
  }
}

template <class T>
int64_t plan_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const Image<T>& y, const ConvShape& shape,
                    void* memory, const ParallelFor& parallel_for) {
  Header h = forward_header(shape, w, x, y, parallel_for.threads);
  h.magic = kMagic, h.bytes = Plan<T>(nullptr, h).size;
  if (memory) {
    *static_cast<Header*>(memory) = h;
    fill_forward(Plan<T>(memory, h), shape, w, parallel_for);
  }
  return h.bytes;
}

bool read_plan(const void* memory, int64_t bytes, PlannedConv& sizes) {
  Header h;
  if (bytes < int64_t(sizeof h)) return false;
  std::memcpy(&h, memory, sizeof h);
  if (h.magic != kMagic || h.bytes != bytes) return false;
  sizes = {h.element, h.geometry.batch, h.sizes[0], h.sizes[1], h.sizes[2], h.sizes[3], h.sizes[4], h.sizes[5]};
  return true;
}

template <class T>
void run_plan(const void* memory, const Image<const T>& x, const T* bias, bool relu, const Image<T>& y,
              const ParallelFor& parallel_for) {
  void* plan = const_cast<void*>(memory);  // only read
  run(Plan<T>(plan, *static_cast<const Header*>(plan)), x, bias, relu, y, parallel_for);
}

template <class T>
void lrs_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const T* bias, const Image<T>& y,
                const ConvShape& shape, const ParallelFor& parallel_for) {
  if (shape.batch == 0 || y.height * y.width * y.channels == 0) return;
  const PlanOfCall<T> call(forward_header(shape, w, x, y, parallel_for.threads));
  const Plan<T>& plan = call.plan;
  fill_forward(plan, shape, w, parallel_for);
  run(plan, x, bias, false, y, parallel_for);
}

template <class T>
void lrs_conv2d_grad_input(const Image<const T>& dy, const ConvWeights<T>& w, const Image<T>& dx,
                           const ConvShape& shape, const ParallelFor& parallel_for) {
  if (shape.batch == 0 || dx.height * dx.width * dx.channels == 0) return;
  const PlanOfCall<T> call(grad_header(shape, w, dy, dx, parallel_for.threads));
  const Plan<T>& plan = call.plan;
  fill_grad(plan, shape, w, dx.channels, parallel_for);
  run(plan, dy, static_cast<const T*>(nullptr), false, dx, parallel_for);
}

template <class T>
void lrs_conv2d_grad_weights(const Image<const T>& x, const Image<const T>& dy, const ConvWeights<T>& w, T* du, T* dv,
                             T* dvalues, const ConvShape& shape, const ParallelFor& parallel_for) {
  const int64_t nnz = w.s.nnz(), m = w.s.rows, n = w.s.cols, rank = w.rank, groups = shape.groups, rows = m / groups;
  if (shape.batch == 0 || dy.height * dy.width == 0) {
    std::fill(du, du + m * rank, T(0)), std::fill(dv, dv + groups * rank * n, T(0));
    std::fill(dvalues, dvalues + nnz, T(0));
    return;
  }
  // For a fixed number of threads, so that results do not depend on it.
  const PlanOfCall<T> call(grad_weights_header(shape, w, x, dy, 4));
  const Plan<T>& plan = call.plan;
  const Header& h = *plan.head;
  const Geometry& g = h.geometry;
  const lanes::Window in_window = input_window(g), out_window = output_window(g);
  fill_grad_weights(plan, shape, w, parallel_for);
  Blocked<T> u_grad{rank > 0 ? rows : 0, std::vector<int32_t>(rank)};  // of one group
  Blocked<T> v_grad{rank, std::vector<int32_t>(rank > 0 ? n : 0)};
  for (int64_t c = 0; c < rank; ++c) u_grad.columns[c] = int32_t(c * lanes::plane_of<T>(out_window));
  for (int64_t c = 0; c < int64_t(v_grad.columns.size()); ++c)
    v_grad.columns[c] = int32_t(c / (h.taps - 1) * lanes::plane_of<T>(in_window) + plan.taps[c % (h.taps - 1)]);
  std::vector<int32_t> steps(g.positions());
  for (int64_t i = 0; i < g.positions(); ++i) steps[i] = int32_t(i * kLanes<T>);

  // Chunks of items, each with its own sums, which are added in order; where they are few, threads share a chunk's
  // rows.
  const int64_t group_size = u_grad.size() + v_grad.size(), size = round_up(nnz, kLanes<T>) + groups * group_size;
  const int64_t most = std::max<int64_t>(2, (int64_t(64) << 20) / std::max<int64_t>(1, size * int64_t(sizeof(T))));
  const int64_t chunks = std::min({g.items(), int64_t(8), most}), slices = ceil_div(parallel_for.threads, chunks);
  const Scratch<T> memory(Slot::sums, chunks * size);
  T* partial = memory.get();
  parallel_for(chunks * size, 1 << 16,
               [&](int64_t begin, int64_t end) { std::fill(partial + begin, partial + end, T(0)); });
  const auto gradients_of_item = [&](int64_t item, int64_t slice, const Buffers<T>& b, T* sums) SIMD_LAMBDA() {
    lanes::pack(x, g, in_window, item, 0, h.channels, b.in);
    // dy, with zeros where no position is: rows and columns beyond the grid are outside of its image.
    lanes::pack(dy, g, out_window, item, 0, m, b.sums);
    T* middle_grad = b.middle + h.ranks * b.middle_size;
    if (rank > 0) {
      multiply_input(plan, b, static_cast<const T*>(nullptr), 0, groups * ceil_div(rank, kQuad), 0, 0);
      std::fill_n(middle_grad, h.ranks * b.middle_size, T(0));
      for (const Part* part = plan.parts + h.parts_in; part < plan.parts + h.parts_in + h.parts_out; ++part)
        dense_part(plan, *part, 0, ceil_div(rank, kQuad), 0, m, b.sums, b.row_size, nullptr, g.positions(), middle_grad,
                   b.middle_size);
    }
    const auto share = [&](int64_t count, int64_t at) { return count * at / slices; };
    T* group_sums = sums + round_up(nnz, kLanes<T>);
    for (int64_t group = 0; group < h.parts_in; ++group, group_sums += group_size) {
      dense_gradient(u_grad, share(u_grad.row_blocks(), slice), share(u_grad.row_blocks(), slice + 1),
                     b.sums + group * rows * b.row_size, b.row_size, b.middle + group * rank * b.middle_size,
                     steps.data(), g.positions(), group_sums);
      dense_gradient(v_grad, share(v_grad.row_blocks(), slice), share(v_grad.row_blocks(), slice + 1),
                     middle_grad + group * rank * b.middle_size, b.middle_size,
                     b.in + group * h.channels / groups * b.plane, plan.places, g.positions(),
                     group_sums + u_grad.size());
    }
    for (int64_t block = 0; block < h.blocks; ++block)
      for (int64_t row = share(m, slice); row < share(m, slice + 1); ++row) {
        const uint32_t* range = plan.row_ptr + block * h.rows + row;
        sampled_row(plan.entries, range[0], range[1], b.in + block * h.block * b.plane, plan.places, g.positions(),
                    b.sums + row * b.row_size, sums, std::make_index_sequence<kEntries<T> - 1>{});
      }
  };
  parallel_for(chunks * slices, 1, [&](int64_t begin, int64_t end) {
    const Buffers<T> buffers(h, 2);
    simd::run([&] SIMD_LAMBDA() {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / slices;
        for (int64_t item = g.items() * chunk / chunks; item < g.items() * (chunk + 1) / chunks; ++item)
          gradients_of_item(item, task % slices, buffers, partial + chunk * size);
      }
    });
  });
  parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {  // the sums of all chunks into the first
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) partial[i] += partial[c * size + i];
  });
  const T* total = partial + round_up(nnz, kLanes<T>);
  parallel_for(nnz, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) dvalues[plan.source[e]] = partial[e];
  });
  const int64_t v_rows = groups * rank, all_rows = rank > 0 ? m + v_rows : 0;
  parallel_for(all_rows, std::max<int64_t>(1, (1 << 14) / (rank + n)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool of_u = row < m;
      const Blocked<T>& grad = of_u ? u_grad : v_grad;
      const int64_t r = of_u ? row : row - m, count = int64_t(grad.columns.size());
      const T* sums = total + r / grad.rows * group_size + (of_u ? 0 : u_grad.size());
      for (int64_t c = 0; c < count; ++c) (of_u ? du : dv)[r * count + c] = sums[grad.at(r % grad.rows, c)];
    }
  });
}

}  // namespace

template <class T>
const ConvKernels<T>& conv2d_kernels() {
  static constexpr ConvKernels<T> kKernels{
      plan_conv2d<T>, read_plan, run_plan<T>, lrs_conv2d<T>, lrs_conv2d_grad_input<T>, lrs_conv2d_grad_weights<T>};
  return kKernels;
}
template const ConvKernels<float>& conv2d_kernels();
template const ConvKernels<double>& conv2d_kernels();

}  // namespace SIMD_NAMESPACE
}  // namespace cmd_ext::cpu
