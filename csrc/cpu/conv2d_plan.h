// Plans of the convolution: how its output grid is cut (geometry), which nonzeros and weights meet at which offsets of
// a packed strip (lanes.h), and the order in which the kernels of conv2d.cpp want them.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "lanes.h"
#include "scratch.h"

namespace cmd_ext::cpu::SIMD_NAMESPACE::conv {

using lanes::ceil_div;
using lanes::Geometry;
using lanes::kLanes;
using lanes::Reach;
using lanes::round_up;

constexpr int64_t kQuad = 4;                                           // rows of the dense products
constexpr int64_t kMagic = 0x636d645f706c0000 + CMD_EXT_VECTOR_BYTES;  // offsets are multiples of a vector

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

// What an item costs besides its geometry.
struct Load {
  int64_t channels, rows, nnz, blocks, element;
  int64_t dense_in, dense_out;  // multiply-adds of the dense products per packed pixel and per position
  bool from_rows, to_rows;      // whether images are contiguous along rows, not along channels
  int64_t sums = 0;             // sums over the positions of the item, for gradients of weights
};
template <class T>
bool along_rows(const Image<T>& image) {
  return image.stride_c != 1 && image.stride_w == 1;
}

struct TileShape {
  int height, width;
  bool always;  // also compiled for double and for two pixels between positions, where fewer shapes do
};
#if CMD_EXT_VECTOR_BYTES == 64  // with 32 registers
constexpr TileShape kTiles[] = {{1, 28, false}, {2, 14, true}, {4, 7, false}, {1, 14, true}, {2, 7, true},
                                {1, 8, true},   {2, 4, true},  {8, 1, true},  {1, 7, true},  {1, 4, true},
                                {4, 1, true},   {1, 2, true},  {1, 1, true}};
#else
constexpr TileShape kTiles[] = {{1, 14, false}, {2, 7, true},  {1, 12, false}, {2, 6, false}, {3, 4, false},
                                {1, 8, true},   {2, 4, true},  {4, 2, false},  {8, 1, true},  {1, 7, true},
                                {1, 4, true},   {2, 2, false}, {4, 1, true},   {1, 2, true},  {1, 1, true}};
#endif
constexpr bool has_tile(const TileShape& tile, int64_t element, int64_t step) {
  return tile.width == 1 || (tile.always ? step <= 2 : step == 1 && element == 4);
}

// Seconds of a call by the constants of an AVX2 machine; only their ratios matter here. `shared`: whether all threads
// work on one item after another, rather than each on its own.
inline double predict(const Geometry& g, const Load& load, int64_t lane_count, int threads, bool& shared) {
  const double tile = double(g.tile_h * g.tile_w), positions = double(g.positions());
  const double packed = double(g.in_h() * g.in_w()), vector = double(lane_count * load.element);
  const double bytes = (load.channels * packed + load.rows * positions) * vector;
  // Along rows whole vectors of columns are moved. Lanes that share their columns are inside of the image together, and
  // a line is read to its end; else all is looked at lane by lane.
  const auto moved = [&](double pixels, int64_t width, int64_t pad, bool rows) {
    if (!rows) return pixels;
    const int64_t columns = g.lane_w == 1 ? std::max<int64_t>(1, width - 2 * pad) : width;
    return (g.lane_w == 1 ? 0.5 : 2.0) * pixels / double(width) * double(round_up(columns, lane_count));
  };
  const double a_byte = bytes > 512e3 ? 2.5e-10 : 1.5e-10;
  const double pack = load.channels * moved(packed, g.in_w(), g.reach.pad_w, load.from_rows) * vector * a_byte;
  const double unpack = load.rows * moved(positions, g.patch_w, 0, load.to_rows) * vector * a_byte;
  // A row's sums depend on each other: below 8 of them the latency of the FMA is what counts.
  const double sparse =
      positions / tile * (double(load.rows * load.blocks) * 9e-9 + double(load.nnz) * std::max(0.2e-9 * tile, 1.5e-9));
  const double dense = (packed * double(load.dense_in) + positions * double(load.dense_out)) * 0.25e-9;
  const double reduce = double(load.sums) * 1e-9;  // their lanes are added once an item
  const double work = sparse + dense + reduce + unpack, items = double(g.items());
  const double dealt = std::ceil(items / threads) * (pack + work);
  const double together = items * (pack + work / threads * 1.1 + 6e-6);  // each packs all
  shared = together < dealt;
  return std::min(dealt, together);
}

// The cheapest cut of the grid into lanes, tiles and strips.
inline Geometry choose_geometry(int64_t batch, int64_t rows, int64_t cols, const Reach& reach, const Load& load,
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

// Where tap `tap` = kh * kernel_w + kw reads: its phase (its distance modulo the stride) and its distance in strides.
struct Tap {
  int64_t phase, down, right;
};
inline Tap tap_at(const ConvShape& s, int64_t tap) {
  const int64_t h = tap / s.kernel_w * s.dilation_h, w = tap % s.kernel_w * s.dilation_w;
  return {h % s.stride_h * s.stride_w + w % s.stride_w, h / s.stride_h, w / s.stride_w};
}

// Channels of a block: what a tile touches of them stays in L1, the more surely the fewer they are. Fewer pay where a
// row has enough nonzeros in a block to make up for loading and storing its sums once more.
inline int64_t block_of(int64_t taps, double density) {
  const int64_t columns = density > 0.125 ? 144 : 216;
  return std::clamp<int64_t>(columns * 32 / CMD_EXT_VECTOR_BYTES / taps / 8 * 8, 8, 128);
}

// The header of y = (U V + S) * x for input [channels, height, width], output sizes and channels of a block.
template <class T>
Header forward_header(const ConvShape& s, const ConvWeights<T>& w, const Image<const T>& x, int64_t out_h,
                      int64_t out_w, bool to_rows, int64_t block, int threads) {
  Header h{};
  const int64_t taps = s.kernel_h * s.kernel_w, rows = w.s.rows, nnz = w.s.nnz();
  h.element = sizeof(T), h.channels = x.channels, h.ranks = s.groups * w.rank, h.rows = rows, h.nnz = nnz;
  h.block = block, h.blocks = ceil_div(x.channels, block), h.taps = taps + 1;
  h.parts_in = h.parts_out = w.rank > 0 ? s.groups : 0;
  h.weights = w.rank * (x.channels * taps + rows);
  h.phases_h = h.phases_w = 1;
  h.sizes = {x.channels, x.height, x.width, rows, out_h, out_w};
  const Reach reach{s.stride_h, s.stride_w, (s.kernel_h - 1) * s.dilation_h + 1, (s.kernel_w - 1) * s.dilation_w + 1,
                    s.pad_h,    s.pad_w};
  const Load load{x.channels, rows, nnz, h.blocks, h.element, 0, h.weights, along_rows(x), to_rows};
  h.geometry = choose_geometry(s.batch, out_h, out_w, reach, load, kLanes<T>, threads, h.shared);
  return h;
}

template <class T>
Header forward_header(const ConvShape& s, const ConvWeights<T>& w, const Image<const T>& x, const Image<T>& y,
                      int threads) {
  const double size = double(w.s.rows) * double(w.s.cols);
  const int64_t block = block_of(s.kernel_h * s.kernel_w, double(w.s.nnz()) / std::max(1.0, size));
  return forward_header(s, w, x, y.height, y.width, along_rows(y), block, threads);
}

// The header of the gradients for the weights: as forward, with the products that add up u's and v's gradients besides.
template <class T>
Header grad_weights_header(const ConvShape& s, const ConvWeights<T>& w, const Image<const T>& x,
                           const Image<const T>& dy, int threads) {
  const int64_t block = block_of(s.kernel_h * s.kernel_w, 0);  // whole eights of nonzeros count for more here
  Header h = forward_header(s, w, x, dy.height, dy.width, along_rows(dy), block, threads);
  const Load load{x.channels, w.s.rows,      h.nnz,         h.blocks,       h.element,
                  0,          2 * h.weights, along_rows(x), along_rows(dy), h.weights + h.nnz};
  h.geometry = choose_geometry(s.batch, dy.height, dy.width, h.geometry.reach, load, kLanes<T>, threads, h.shared);
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
  const double size = double(dy.channels) * double(dx.channels / s.groups * taps);
  h.nnz = w.s.nnz(), h.block = block_of(std::max<int64_t>(1, taps / phases), double(h.nnz) / std::max(1.0, size));
  h.blocks = ceil_div(dy.channels, h.block);
  h.taps = taps + 1;
  h.parts_in = w.rank > 0 ? s.groups : 0, h.parts_out = h.parts_in * phases;
  h.weights = w.rank * (dx.channels * taps + dy.channels);
  h.middle_on_input = 1;
  h.phases_h = s.stride_h, h.phases_w = s.stride_w;
  h.off_h = s.pad_h - first_h * s.stride_h, h.off_w = s.pad_w - first_w * s.stride_w;
  h.sizes = {dy.channels, dy.height, dy.width, dx.channels, dx.height, dx.width};
  const Reach reach{1, 1, far_h + 1, far_w + 1, far_h - first_h, far_w - first_w};
  const Load load{
      dy.channels,    h.rows,        h.nnz, h.blocks, h.element, w.rank * dy.channels, w.rank * dx.channels * taps,
      along_rows(dy), along_rows(dx)};
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

// As forward, with U^T from dy to the gradient of the middle in place of U.
template <class T>
void fill_grad_weights(const Plan<T>& plan, const ConvShape& s, const ConvWeights<T>& w,
                       const ParallelFor& parallel_for) {
  fill_forward(plan, s, w, parallel_for);
  const Header& h = *plan.head;
  const int64_t rows = h.rows / s.groups;
  for (int64_t g = 0; g < h.parts_out; ++g) {
    Part& part = plan.parts[h.parts_in + g];
    part = {g * w.rank, w.rank, g * rows, rows, h.taps - 1, 1, part.weight};
    pack_weights(part, plan.weights,
                 [&](int64_t i, int64_t c, int64_t) { return w.u[(part.channel + c) * w.rank + i]; });
  }
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

// A plan for one call, whose arrays are yet to be filled.
template <class T>
class PlanOfCall : Scratch<char> {
 public:
  explicit PlanOfCall(Header h) : Scratch(Slot::plan, size_of(h)), plan(get(), h) { *plan.head = h; }
  const Plan<T> plan;

 private:
  static int64_t size_of(Header& h) {
    h.magic = kMagic;
    return h.bytes = Plan<T>(nullptr, h).size;
  }
};

}  // namespace cmd_ext::cpu::SIMD_NAMESPACE::conv
