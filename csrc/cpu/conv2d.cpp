// Convolution with the kernel U V + S in one pass, its gradient for x, and the gradient for the values of S.
//
//     y = bias + U (V * x) + S * x          dx = V^T * (U^T dy) + S^T * dy          dvalues = (dy . x) on the support
//
// All run on packed strips whose vector lanes are patches or images (lanes.h), so that every tap is an aligned move.
// Per item: pack the strip; for each block of channels (what a tile touches of it fits L1) the rank products of V and
// the nonzeros of S; then U; unpack. Neither the output nor V * x goes to memory in between.
//   S: a tile of tile_h x tile_w positions of one row of sums stays in up to 14 registers; a nonzero costs a broadcast
//      and one FMA with a memory operand per position: the FMA units' peak while the tile hits L1. About 7 ns a row,
//      block and tile for loading and storing the sums, hence large tiles.
//   U and V: 4 rows x 3 positions in 12 registers, over channels and taps; weights packed in that order.
//   dvalues: the tile of dy stays in registers, a nonzero is 14 FMAs with a memory operand into two chains; eight such
//      vectors are transposed and added into eight sums.
// The gradient for x is the same convolution of dy, with one group of output rows per phase of the stride; there the
// product with U^T comes first, on all of the packed strip. Operations 2 (nnz + rank products) positions; bytes: x and
// y once each, packed 2.5 times. Everything that depends on weights and sizes alone is a plan (a flat block of memory
// that can be kept between calls). Results do not depend on the number of threads.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "lanes.h"

namespace cmd_ext::cpu {
namespace {

using lanes::ceil_div;
using lanes::Geometry;
using lanes::kLanes;
using lanes::Reach;
using lanes::round_up;
using lanes::Target;
using lanes::Vec;

constexpr int64_t kQuad = 4, kAtOnce = 3;  // rows and positions of the dense products
constexpr int64_t kMagic = 0x636d645f706c616e;
constexpr int64_t kUnits = 64;  // pieces that the rows of one item are dealt in

template <class T>
struct Entry {
  T value;
  uint32_t offset;  // from the tile's first pixel, within the channel block
};

// A dense product: rows [row, row + rows) += weights * channels [channel, channel + channels), at each of the taps.
// Weights lie as [rows / 4][channels][taps][4].
struct Part {
  int64_t row, rows, channel, channels, tap, taps, weight;
};

struct Header {
  int64_t magic, bytes, element;
  Geometry geometry;
  int64_t channels, ranks, rows;  // of the input, between the factors, of the output grid
  int64_t block, blocks;          // channels of a block
  int64_t nnz, taps, weights;     // array sizes
  int64_t parts_in, parts_out;    // products with the input and with the middle
  bool shared;                    // whether all threads work on one item after another
  int64_t middle_on_input;        // whether the middle exists at all packed pixels (gradient) or at the positions
  int64_t phases_h, phases_w, off_h, off_w;
  std::array<int64_t, 6> sizes;  // channels, height, width of the input and of the output
};

// The arrays of a plan, in the memory behind its header.
template <class T>
struct Plan {
  Header* head;
  Entry<T>* entries;  // [nnz], by channel block, then row
  uint32_t* row_ptr;  // [blocks * rows + 1]
  int32_t* source;    // [nnz] index of the value in the CSR
  Part* parts;        // [parts_in + parts_out]
  int32_t* taps;      // offsets in a packed channel
  int32_t* places;    // [positions] of the grid in a packed channel
  T* weights;

  Plan(void* memory, const Header& h) : head(static_cast<Header*>(memory)) {
    char* at = static_cast<char*>(memory) + round_up(sizeof(Header), 64);
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += round_up(count * int64_t(sizeof(*array)), 64);
    };
    take(entries, h.nnz);
    take(row_ptr, h.blocks * h.rows + 1);
    take(source, h.nnz);
    take(parts, h.parts_in + h.parts_out);
    take(taps, h.taps);
    take(places, h.geometry.positions());
    take(weights, h.weights);
    size = at - static_cast<char*>(memory);
  }
  int64_t size;
};

// Geometry
// -------------------------------------------------------------------------------------------------------------

// What an item costs besides its geometry.
struct Load {
  int64_t channels, rows, nnz, blocks, element;
  int64_t dense_in, dense_out;  // multiply-adds of the dense products per packed pixel and per position
};

struct TileShape {
  int height, width;
  bool always;  // also compiled for double and for two pixels between positions, where fewer shapes do
};
constexpr TileShape kTiles[] = {{1, 14, false}, {2, 7, true},  {1, 12, false}, {2, 6, false}, {3, 4, false},
                                {1, 8, true},   {2, 4, true},  {4, 2, false},  {8, 1, true},  {1, 7, true},
                                {1, 4, true},   {2, 2, false}, {4, 1, true},   {1, 2, true},  {1, 1, true}};
constexpr bool has_tile(const TileShape& tile, int64_t element, int64_t step) {
  return tile.width == 1 || (tile.always ? step <= 2 : step == 1 && element == 4);
}

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

// Seconds of a call by the constants of an AVX2 machine; only their ratios matter here. `shared`: whether all threads
// work on one item after another, rather than each on its own.
double predict(const Geometry& g, const Load& load, int64_t lane_count, int threads, bool& shared) {
  const double tile = double(g.tile_h * g.tile_w), positions = double(g.positions());
  const double packed = double(g.in_h() * g.in_w()), vector = double(lane_count * load.element);
  const double bytes = (load.channels * packed + load.rows * positions) * vector;
  const double pack = bytes * (bytes > 512e3 ? 2.5e-10 : 1.5e-10);
  // A row's sums depend on each other: below 8 of them the latency of the FMA is what counts.
  const double sparse =
      positions / tile * (double(load.rows * load.blocks) * 9e-9 + double(load.nnz) * std::max(0.2e-9 * tile, 1.5e-9));
  const double dense = (packed * double(load.dense_in) + positions * double(load.dense_out)) * 0.25e-9;
  const double item = pack + sparse + dense, items = double(g.items());
  const double dealt = std::ceil(items / threads) * item, together = items * (item / threads * 1.15 + 8e-6);
  shared = together < dealt;
  return std::min(dealt, together);
}

// The cheapest cut of the grid into lanes, tiles and strips.
Geometry choose_geometry(int64_t batch, int64_t rows, int64_t cols, const Reach& reach, const Load& load,
                         int lane_count, int threads, bool& shared) {
  Geometry best{};
  double least = 0;
  Geometry g{batch, rows, cols, reach, 0, 0, 0, 0, 0, 0, 0, 0};
  for (g.lane_n = 1; g.lane_n <= lane_count; g.lane_n *= 2)
    for (g.lane_h = 1; g.lane_h * g.lane_n <= lane_count; g.lane_h *= 2) {
      g.lane_w = lane_count / g.lane_n / g.lane_h;
      for (const TileShape& tile : kTiles) {
        if (!has_tile(tile, load.element, reach.step_w)) continue;
        g.tile_h = tile.height, g.tile_w = tile.width;
        g.patch_w = round_up(ceil_div(cols, g.lane_w), g.tile_w);
        const int64_t patch_rows = ceil_div(rows, g.lane_h);
        for (int64_t repeat = 1; repeat <= 4; repeat *= 2) {
          g.strip = g.tile_h * repeat;
          if (repeat > 1 && g.strip > round_up(patch_rows, g.tile_h)) break;
          g.patch_h = round_up(patch_rows, g.strip);
          bool together;
          const double seconds = predict(g, load, lane_count, threads, together);
          if (least == 0 || seconds < least) best = g, least = seconds, shared = together;
        }
      }
    }
  return best;
}

// Plans
// ----------------------------------------------------------------------------------------------------------------

// Where tap `tap` = kh * kernel_w + kw reads: its phase (its distance modulo the stride) and its distance in strides.
struct Tap {
  int64_t phase, down, right;
};
Tap tap_at(const ConvShape& s, int64_t tap) {
  const int64_t h = tap / s.kernel_w * s.dilation_h, w = tap % s.kernel_w * s.dilation_w;
  return {h % s.stride_h * s.stride_w + w % s.stride_w, h / s.stride_h, w / s.stride_w};
}

int64_t block_of(int64_t taps) { return std::clamp<int64_t>(288 / taps / 8 * 8, 8, 128); }

// The header of y = (U V + S) * x for input [channels, height, width] and output sizes y.
template <class T>
Header forward_header(const ConvShape& s, const ConvWeights<T>& w, const Image<const T>& x, int64_t out_h,
                      int64_t out_w, int64_t nnz, int64_t rows, int threads) {
  Header h{};
  const int64_t taps = s.kernel_h * s.kernel_w;
  h.element = sizeof(T), h.channels = x.channels, h.ranks = s.groups * w.rank, h.rows = rows, h.nnz = nnz;
  h.block = block_of(taps), h.blocks = ceil_div(x.channels, h.block), h.taps = taps + 1;
  h.parts_in = h.parts_out = w.rank > 0 ? s.groups : 0;
  h.weights = w.rank * (x.channels * taps + rows);
  h.phases_h = h.phases_w = 1;
  h.sizes = {x.channels, x.height, x.width, rows, out_h, out_w};
  const Reach reach{s.stride_h, s.stride_w, (s.kernel_h - 1) * s.dilation_h + 1, (s.kernel_w - 1) * s.dilation_w + 1,
                    s.pad_h,    s.pad_w};
  const Load load{x.channels, rows, nnz, h.blocks, h.element, 0, h.weights};
  h.geometry = choose_geometry(s.batch, out_h, out_w, reach, load, kLanes<T>, threads, h.shared);
  return h;
}

// The header of the gradient for x [channels, height, width]: rows are (phase, channel), the input is dy.
template <class T>
Header grad_header(const ConvShape& s, const ConvWeights<T>& w, const Image<const T>& dy, const Image<T>& dx,
                   int threads) {
  Header h{};
  const int64_t taps = s.kernel_h * s.kernel_w, phases = s.stride_h * s.stride_w;
  const int64_t far_h = (s.kernel_h - 1) * s.dilation_h / s.stride_h,
                far_w = (s.kernel_w - 1) * s.dilation_w / s.stride_w;
  const int64_t first_h = s.pad_h / s.stride_h, first_w = s.pad_w / s.stride_w;
  h.element = sizeof(T), h.channels = dy.channels, h.ranks = s.groups * w.rank, h.rows = phases * dx.channels;
  h.nnz = w.s.nnz(), h.block = block_of(std::max<int64_t>(1, taps / phases)), h.blocks = ceil_div(dy.channels, h.block);
  h.taps = taps + 1;
  h.parts_in = w.rank > 0 ? s.groups : 0, h.parts_out = h.parts_in * phases;
  h.weights = w.rank * (dx.channels * taps + dy.channels);
  h.middle_on_input = 1;
  h.phases_h = s.stride_h, h.phases_w = s.stride_w;
  h.off_h = s.pad_h - first_h * s.stride_h, h.off_w = s.pad_w - first_w * s.stride_w;
  h.sizes = {dy.channels, dy.height, dy.width, dx.channels, dx.height, dx.width};
  const Reach reach{1, 1, far_h + 1, far_w + 1, far_h - first_h, far_w - first_w};
  const Load load{dy.channels, h.rows, h.nnz, h.blocks, h.element, w.rank * dy.channels, w.rank * dx.channels * taps};
  h.geometry =
      choose_geometry(s.batch, (dx.height - 1 + s.pad_h) / s.stride_h - first_h + 1,
                      (dx.width - 1 + s.pad_w) / s.stride_w - first_w + 1, reach, load, kLanes<T>, threads, h.shared);
  return h;
}

// weights [rows / 4][channels][taps][4] <- at(row, channel, tap)
template <class T, class At>
void pack_weights(const Part& part, T* out, const At& at) {
  out += part.weight;
  for (int64_t first = 0; first < part.rows; first += kQuad)
    for (int64_t c = 0; c < part.channels; ++c)
      for (int64_t t = 0; t < part.taps; ++t)
        for (int64_t i = first; i < std::min(part.rows, first + kQuad); ++i) *out++ = at(i, c, t);
}

// entries, row_ptr and source from each_nonzero(row, visit(channel, offset of the tap, index in the CSR)).
template <class T, class EachNonzero>
void list_nonzeros(const Plan<T>& plan, const T* values, const EachNonzero& each_nonzero,
                   const ParallelFor& parallel_for) {
  const Header& h = *plan.head;
  const int64_t plane = lanes::plane_of<T>(input_window(h.geometry));
  std::fill(plan.row_ptr, plan.row_ptr + h.blocks * h.rows + 1, 0u);
  if (h.nnz == 0) return;
  struct Channel {
    uint32_t block, offset;
  };
  std::vector<Channel> channels(h.channels);  // divisions once a channel, not once a nonzero
  for (int64_t c = 0; c < h.channels; ++c) channels[c] = {uint32_t(c / h.block), uint32_t(c % h.block * plane)};
  const int64_t grain = std::max<int64_t>(1, h.rows * 8192 / h.nnz);
  parallel_for(h.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      each_nonzero(
          row, [&](int64_t channel, int64_t, int64_t) { ++plan.row_ptr[channels[channel].block * h.rows + row + 1]; });
  });
  for (int64_t i = 0; i < h.blocks * h.rows; ++i) plan.row_ptr[i + 1] += plan.row_ptr[i];
  parallel_for(h.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> next(h.blocks);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t b = 0; b < h.blocks; ++b) next[b] = plan.row_ptr[b * h.rows + row];
      each_nonzero(row, [&](int64_t channel, int64_t offset, int64_t k) {
        const Channel& at = channels[channel];
        const uint32_t place = next[at.block]++;
        plan.entries[place] = {values ? values[k] : T(0), uint32_t(at.offset + offset)};
        plan.source[place] = int32_t(k);
      });
    }
  });
}

template <class T>
void fill_places(const Plan<T>& plan) {
  const Geometry& g = plan.head->geometry;
  for (int64_t i = 0; i < g.positions(); ++i)
    plan.places[i] = int32_t((i / g.patch_w * g.reach.step_h * g.in_w() + i % g.patch_w * g.reach.step_w) * kLanes<T>);
}

template <class T>
void fill_forward(const Plan<T>& plan, const ConvShape& s, const ConvWeights<T>& w, const ParallelFor& parallel_for) {
  const Header& h = *plan.head;
  const int64_t taps = s.kernel_h * s.kernel_w, in_w = h.geometry.in_w();
  const int64_t channels = h.channels / s.groups, rows = h.rows / s.groups, n = channels * taps;
  fill_places(plan);
  for (int64_t t = 0; t < taps; ++t)
    plan.taps[t] = int32_t((t / s.kernel_w * s.dilation_h * in_w + t % s.kernel_w * s.dilation_w) * kLanes<T>);
  plan.taps[taps] = 0;
  for (int64_t g = 0; g < h.parts_in; ++g) {
    const Part first{g * w.rank, w.rank, g * channels, channels, 0, taps, g * w.rank * n};
    const Part second{g * rows, rows, g * w.rank, w.rank, taps, 1, h.ranks * n + g * rows * w.rank};
    plan.parts[g] = first, plan.parts[h.parts_in + g] = second;
    pack_weights(first, plan.weights,
                 [&](int64_t i, int64_t c, int64_t t) { return w.v[(first.row + i) * n + c * taps + t]; });
    pack_weights(second, plan.weights,
                 [&](int64_t i, int64_t c, int64_t) { return w.u[(second.row + i) * w.rank + c]; });
  }
  struct Column {
    int32_t channel, offset;
  };
  std::vector<Column> columns(n);  // divisions once a column, not once a nonzero
  for (int64_t c = 0; c < n; ++c) columns[c] = {int32_t(c / taps), plan.taps[c % taps]};
  list_nonzeros(
      plan, w.s.values,
      [&](int64_t row, const auto& visit) {
        const int64_t first = row / rows * channels;
        for (int64_t k = w.s.row_ptr[row]; k < w.s.row_ptr[row + 1]; ++k) {
          const Column& column = columns[w.s.col_idx[k]];
          visit(first + column.channel, column.offset, k);
        }
      },
      parallel_for);
}

template <class T>
void fill_grad(const Plan<T>& plan, const ConvShape& s, const ConvWeights<T>& w, int64_t dx_channels,
               const ParallelFor& parallel_for) {
  const Header& h = *plan.head;
  const int64_t taps = s.kernel_h * s.kernel_w, phases = s.stride_h * s.stride_w, in_w = h.geometry.in_w();
  const int64_t channels = dx_channels / s.groups, n = channels * taps, m = h.channels, rows = m / s.groups;
  const int64_t span_h = h.geometry.reach.span_h, span_w = h.geometry.reach.span_w;
  fill_places(plan);
  std::vector<int64_t> order, begin{0};  // taps by phase
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t t = 0; t < taps; ++t)
      if (const Tap tap = tap_at(s, t); tap.phase == phase) {
        plan.taps[order.size()] = int32_t(((span_h - 1 - tap.down) * in_w + span_w - 1 - tap.right) * kLanes<T>);
        order.push_back(t);
      }
    begin.push_back(int64_t(order.size()));
  }
  plan.taps[taps] = 0;
  int64_t weight = 0;
  Part* part = plan.parts;
  for (int64_t g = 0; g < h.parts_in; ++g, ++part) {
    *part = {g * w.rank, w.rank, g * rows, rows, taps, 1, weight};
    weight += w.rank * rows;
    pack_weights(*part, plan.weights, [&](int64_t i, int64_t c, int64_t) { return w.u[(g * rows + c) * w.rank + i]; });
  }
  for (int64_t phase = 0; phase < phases && h.parts_in > 0; ++phase)
    for (int64_t g = 0; g < s.groups; ++g, ++part) {
      const int64_t first = begin[phase], count = begin[phase + 1] - first;
      *part = {phase * dx_channels + g * channels, channels, g * w.rank, w.rank, first, count, weight};
      weight += channels * w.rank * count;
      pack_weights(*part, plan.weights, [&](int64_t i, int64_t c, int64_t t) {
        return w.v[(g * w.rank + c) * n + i * taps + order[first + t]];
      });
    }
  list_nonzeros(
      plan, w.s.values,
      [&](int64_t row, const auto& visit) {
        const int64_t phase = row / dx_channels, channel = row % dx_channels;
        for (int64_t t = begin[phase]; t < begin[phase + 1]; ++t) {
          const int64_t column = channel * taps + order[t];  // of all groups: group * n + c * taps + tap
          for (int64_t k = w.s.row_ptr[column]; k < w.s.row_ptr[column + 1]; ++k)
            visit(w.s.col_idx[k], plan.taps[t], k);
        }
      },
      parallel_for);
}

// Kernels
// --------------------------------------------------------------------------------------------------------------

// A tile of vectors in registers: loaded from and stored to lines of positions, `step` vectors apart.
template <class T, int kHeight, int kWidth>
struct Tile {
  Vec<T> at[kHeight * kWidth];

  SIMD_INLINE void load(const T* from, int64_t line) {
#pragma GCC unroll 16
    for (int h = 0; h < kHeight; ++h, from = simd::opaque(from + line))
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) at[h * kWidth + w] = simd::load(from + w * kLanes<T>);
  }
  SIMD_INLINE void store(T* to, int64_t line) const {
#pragma GCC unroll 16
    for (int h = 0; h < kHeight; ++h, to = simd::opaque(to + line))
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) simd::store(to + w * kLanes<T>, at[h * kWidth + w]);
  }
  // this += value * x
  template <int kStep>
  SIMD_INLINE void add_product(T value, const T* x, int64_t line) {
#pragma GCC unroll 16
    for (int h = 0; h < kHeight; ++h, x = simd::opaque(x + line))
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) at[h * kWidth + w] += value * simd::load(x + w * kStep * kLanes<T>);
  }
  // The sum over the tile of this * x, lane by lane; two chains.
  template <int kStep>
  SIMD_INLINE Vec<T> dot(const T* x, int64_t line) const {
    Vec<T> chain[2] = {};
#pragma GCC unroll 16
    for (int h = 0; h < kHeight; ++h, x = simd::opaque(x + line))
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w)
        chain[(h * kWidth + w) % 2] += at[h * kWidth + w] * simd::load(x + w * kStep * kLanes<T>);
    return chain[0] + chain[1];
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

// values [entry] += the products of dy's tile with x's, summed over positions and lanes; room for kLanes more.
template <class T, int kHeight, int kWidth, int kStep>
SIMD_INLINE void sampled_tile(const Entry<T>* entries, const uint32_t* row_ptr, int64_t begin, int64_t end, const T* in,
                              int64_t in_line, const T* dy, int64_t row_size, int64_t line, T* values) {
  constexpr int kCount = kLanes<T>;
  Tile<T, kHeight, kWidth> grad;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t last = row_ptr[row + 1];
    if (row_ptr[row] == last) continue;
    grad.load(dy + row * row_size, line);
    for (int64_t first = row_ptr[row]; first < last; first += kCount) {
      Vec<T> products[kCount] = {};
      const int64_t count = std::min<int64_t>(kCount, last - first);
      for (int64_t e = 0; e < count; ++e)
        products[e] = grad.template dot<kStep>(simd::opaque(in + entries[first + e].offset), in_line);
      lanes::transpose(products);
      Vec<T> total = products[0];
      for (int e = 1; e < kCount; ++e) total += products[e];
      simd::store(values + first, simd::load(values + first) + total);  // adds zeros beyond the row
    }
  }
}

// out [kRows][kPositions] += weights [channels][taps][kRows] * in at the taps.
template <class T, int kRows, int kPositions>
SIMD_INLINE void dense_tile(const T* in, const int64_t* places, int64_t plane, int64_t channels, const int32_t* taps,
                            int64_t tap_count, const T* weights, T* out, int64_t row_size) {
  Vec<T> acc[kRows * kPositions];
  const T* source[kPositions];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kPositions; ++i)
    acc[i] = simd::load(out + i / kPositions * row_size + i % kPositions * kLanes<T>);
#pragma GCC unroll 4
  for (int j = 0; j < kPositions; ++j) source[j] = in + places[j];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < tap_count; ++t, weights += kRows) {
      const int64_t tap = taps[t];
      Vec<T> x[kPositions];
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) x[j] = simd::load(source[j] + tap);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kPositions; ++j) acc[i * kPositions + j] += weights[i] * x[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < kPositions; ++j) source[j] += plane;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kPositions; ++i)
    simd::store(out + i / kPositions * row_size + i % kPositions * kLanes<T>, acc[i]);
}

// One quad of rows of a part at all positions, over channels [begin, end) of the input.
template <class T, int kRows>
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
    if (count == 3) dense_tile<T, kRows, 3>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
    if (count == 2) dense_tile<T, kRows, 2>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
    if (count == 1) dense_tile<T, kRows, 1>(source, at, plane, channels, taps, part.taps, weights, target, row_size);
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
  for (int64_t quad = first; quad < last; ++quad) {
    const int64_t rows = std::min(kQuad, part.rows - quad * kQuad);
    if (rows == 4) dense_rows<T, 4>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
    if (rows == 3) dense_rows<T, 3>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
    if (rows == 2) dense_rows<T, 2>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
    if (rows == 1) dense_rows<T, 1>(plan, part, quad, begin, end, in, plane, places, positions, out, row_size);
  }
}

// Memory of one item: the packed input, the middle, the sums. Kept by each thread between calls.
template <class T>
struct Buffers {
  T *in, *middle, *sums;
  int64_t plane, row_size, middle_size;

  explicit Buffers(const Header& h) {
    plane = lanes::plane_of<T>(input_window(h.geometry));
    row_size = lanes::plane_of<T>(output_window(h.geometry));
    middle_size = h.middle_on_input ? plane : row_size;
    const int64_t in_size = round_up(h.channels * plane, 16), sums_size = round_up(h.rows * row_size, 16);
    in = memory(in_size + sums_size + h.ranks * middle_size);
    sums = in + in_size, middle = sums + sums_size;
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static T* memory(int64_t count) {
    thread_local std::unique_ptr<T, Free> kept;
    thread_local int64_t size = 0;
    if (count > size) {
      kept.reset();
      size = round_up(count, 4096 / sizeof(T));
      kept.reset(static_cast<T*>(std::aligned_alloc(4096, size * sizeof(T))));
      if (!kept) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return kept.get();
  }
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

// Runs a plan: out = bias + (U V + S) * in, as far as the plan has these branches.
template <class T>
void run(const Plan<T>& plan, const Image<const T>& in, const T* bias, const Image<T>& out,
         const ParallelFor& parallel_for) {
  const Header& h = *plan.head;
  const Geometry& g = h.geometry;
  const Target<T> target{out, h.phases_h, h.phases_w, h.off_h, h.off_w};
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
  // Few items: all threads work on each, first on its channels, then on its rows.
  const Buffers<T> buffers(h);
  const auto rows_at = [&](int64_t unit) { return unit == kUnits ? h.rows : h.rows * unit / kUnits / 8 * 8; };
  const auto quads_at = [&](int64_t unit) { return quads * unit / kUnits; };
  const auto channels_at = [&](int64_t unit) {
    return unit == kUnits ? h.channels : h.channels * unit / kUnits / 8 * 8;
  };
  for (int64_t item = 0; item < g.items(); ++item) {
    parallel_for(kUnits, 1, [&](int64_t begin, int64_t end) {
      simd::run(
          [&] SIMD_LAMBDA() { lanes::pack(in, g, window, item, channels_at(begin), channels_at(end), buffers.in); });
    });
    parallel_for(kUnits, 1, [&](int64_t begin, int64_t end) {
      simd::run([&] SIMD_LAMBDA() {
        multiply_input(plan, buffers, bias, quads_at(begin), quads_at(end), rows_at(begin), rows_at(end));
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

// A plan in `memory`, whose arrays are yet to be filled.
template <class T>
Plan<T> allocate(Header h, std::unique_ptr<char[]>& memory) {
  h.magic = kMagic, h.bytes = Plan<T>(nullptr, h).size;
  memory.reset(new char[h.bytes + 64]);
  void* start = memory.get();
  size_t space = h.bytes + 64;
  std::align(64, h.bytes, start, space);
  *static_cast<Header*>(start) = h;
  return Plan<T>(start, h);
}

}  // namespace

template <class T>
int64_t plan_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const Image<T>& y, const ConvShape& shape,
                    void* memory, const ParallelFor& parallel_for) {
  Header h = forward_header(shape, w, x, y.height, y.width, w.s.nnz(), y.channels, parallel_for.threads);
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
void run_plan(const void* memory, const Image<const T>& x, const T* bias, const Image<T>& y,
              const ParallelFor& parallel_for) {
  void* plan = const_cast<void*>(memory);  // only read
  run(Plan<T>(plan, *static_cast<const Header*>(plan)), x, bias, y, parallel_for);
}

template <class T>
void lrs_conv2d(const Image<const T>& x, const ConvWeights<T>& w, const T* bias, const Image<T>& y,
                const ConvShape& shape, const ParallelFor& parallel_for) {
  if (shape.batch == 0 || y.height * y.width * y.channels == 0) return;
  std::unique_ptr<char[]> memory;
  const Plan<T> plan =
      allocate<T>(forward_header(shape, w, x, y.height, y.width, w.s.nnz(), y.channels, parallel_for.threads), memory);
  fill_forward(plan, shape, w, parallel_for);
  run(plan, x, bias, y, parallel_for);
}

template <class T>
void lrs_conv2d_grad_input(const Image<const T>& dy, const ConvWeights<T>& w, const Image<T>& dx,
                           const ConvShape& shape, const ParallelFor& parallel_for) {
  if (shape.batch == 0 || dx.height * dx.width * dx.channels == 0) return;
  std::unique_ptr<char[]> memory;
  const Plan<T> plan = allocate<T>(grad_header(shape, w, dy, dx, parallel_for.threads), memory);
  fill_grad(plan, shape, w, dx.channels, parallel_for);
  run(plan, dy, static_cast<const T*>(nullptr), dx, parallel_for);
}

template <class T>
void sparse_conv2d_grad_values(const Image<const T>& x, const Image<const T>& dy, const Csr<T>& pattern, T* dvalues,
                               const ConvShape& shape, const ParallelFor& parallel_for) {
  const int64_t nnz = pattern.nnz();
  std::fill(dvalues, dvalues + nnz, T(0));
  if (nnz == 0 || shape.batch == 0) return;
  const ConvWeights<T> weights{
      {pattern.rows, pattern.cols, nullptr, pattern.row_ptr, pattern.col_idx}, nullptr, nullptr, 0};
  std::unique_ptr<char[]> memory;
  const Plan<T> plan =
      allocate<T>(forward_header(shape, weights, x, dy.height, dy.width, nnz, pattern.rows, 4), memory);
  const Header& h = *plan.head;
  fill_forward(plan, shape, weights, parallel_for);

  // Chunks of items, each with its own sums, which are added in order; their number depends on the sizes alone.
  const Geometry& g = h.geometry;
  const int64_t most = std::max<int64_t>(2, (int64_t(64) << 20) / (nnz * int64_t(sizeof(T))));
  const int64_t chunks = std::min({g.items(), int64_t(8), most});
  const int64_t slices = std::min<int64_t>(ceil_div(8, chunks), ceil_div(h.rows, 8));  // of the rows
  const int64_t size = nnz + kLanes<T>;
  std::vector<T> partial(chunks * size);
  parallel_for(chunks * slices, 1, [&](int64_t begin, int64_t end) {
    const Buffers<T> b(h);
    simd::run([&] SIMD_LAMBDA() {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / slices, slice = task % slices;
        const int64_t row_begin = h.rows * slice / slices, row_end = h.rows * (slice + 1) / slices;
        for (int64_t item = g.items() * chunk / chunks; item < g.items() * (chunk + 1) / chunks; ++item) {
          lanes::pack(x, g, input_window(g), item, 0, h.channels, b.in);
          // dy, with zeros where no position is: rows and columns beyond the grid are outside of its image.
          lanes::pack(dy, g, output_window(g), item, row_begin, row_end, b.sums);
          const int64_t in_line = g.reach.step_h * g.in_w() * kLanes<T>, line = g.patch_w * kLanes<T>;
          for (int64_t block = 0; block < h.blocks; ++block)
            with_tile<T>(g, [&](auto height, auto width, auto step) SIMD_LAMBDA() {
              for (int64_t top = 0; top < g.strip; top += height)
                for (int64_t left = 0; left < g.patch_w; left += width)
                  sampled_tile<T, height, width, step>(
                      plan.entries, plan.row_ptr + block * h.rows, row_begin, row_end,
                      b.in + block * h.block * b.plane + top * in_line + left * g.reach.step_w * kLanes<T>, in_line,
                      b.sums + top * line + left * kLanes<T>, b.row_size, line, partial.data() + chunk * size);
            });
        }
      }
    });
  });
  parallel_for(nnz, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      T sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * size + e];
      dvalues[plan.source[e]] = sum;
    }
  });
}

#define INSTANTIATE(T)                                                                                                 \
  template int64_t plan_conv2d(const Image<const T>&, const ConvWeights<T>&, const Image<T>&, const ConvShape&, void*, \
                               const ParallelFor&);                                                                    \
  template void run_plan(const void*, const Image<const T>&, const T*, const Image<T>&, const ParallelFor&);           \
  template void lrs_conv2d(const Image<const T>&, const ConvWeights<T>&, const T*, const Image<T>&, const ConvShape&,  \
                           const ParallelFor&);                                                                        \
  template void lrs_conv2d_grad_input(const Image<const T>&, const ConvWeights<T>&, const Image<T>&, const ConvShape&, \
                                      const ParallelFor&);                                                             \
  template void sparse_conv2d_grad_values(const Image<const T>&, const Image<const T>&, const Csr<T>&, T*,             \
                                          const ConvShape&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cmd_ext::cpu
