// How a convolution is cut into tiles: the arithmetic of one axis, the plan that the launchers make of it, and the two
// halves of a kernel's inner loop, staging a block of channels and walking the nonzeros of some rows through it. The
// kernels themselves, and the reasons for this shape, are in conv2d.cuh.
//
// Positions. A kernel computes a lattice of output pixels: all of them, or, in the gradient for the input of a strided
// convolution, those of one phase (pixel modulo stride), so that on each axis position q writes pixel q * out_step +
// out_first and tap k reads source pixel q * source_step + a constant. A tile is a rectangle of positions of one image,
// or the whole map of several small images; the last tile of an axis overlaps its neighbour instead of leaving the map,
// so every position of a tile is a real pixel, and each pixel is owned by one tile.
//
// Cells. kPack tiles are staged interleaved: a cell of 16 bytes holds the same place of each. Hence one LDS.128 at one
// address serves kPack tiles whatever the tap's alignment, and lanes are spread over the positions of a tile.
//
// Slots. The staged pixels of an axis are grouped by their residue modulo source_step (only residues that some tap
// reads), so that neighbouring positions read neighbouring cells for any stride, and a tap is ONE constant offset.
// Pitches are padded so that the cells of 8 consecutive positions lie in 8 different groups of 4 banks.
#pragma once

#include <algorithm>
#include <climits>
#include <numeric>
#include <type_traits>

#include "gpu.h"
#include "kernels.h"

namespace cmd_ext::cuda::conv {

constexpr int kMaxWarps = 8;
constexpr int kLeastSharedBytes = 48 << 10, kMostSharedBytes = 96 << 10;

template <class T>
constexpr int kPack = 16 / int(sizeof(T));
template <class T>
struct alignas(16) Cell {
  T tile[kPack<T>];
};

// The elements of a cell, which is read at once: element by element the reads would stay apart, each with the bank
// conflicts of a stride of 16 bytes. The pairs of bf16 by hand, as the compiler takes a third instruction for each.
template <class T>
__device__ __forceinline__ void widen(const Cell<T>& cell, gpu::Acc<T> (&values)[kPack<T>]) {
  if constexpr (sizeof(T) == 8) {
    const double2 pair = reinterpret_cast<const double2&>(cell);
    values[0] = pair.x, values[1] = pair.y;
  } else {
    const uint4 words = reinterpret_cast<const uint4&>(cell);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
      if constexpr (sizeof(T) == 4) {
        values[i] = __uint_as_float(word);
      } else if constexpr (std::is_same_v<T, gpu::bf16>) {
        values[2 * i] = __uint_as_float(word << 16);
        values[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        values[2 * i] = gpu::widen(__ushort_as_half(uint16_t(word)));
        values[2 * i + 1] = gpu::widen(__ushort_as_half(uint16_t(word >> 16)));
      }
    }
  }
}

template <class T>
constexpr int kCells = sizeof(T) == 2 ? 1 : 2;  // positions a lane: 8 sums in 32 bits or 4 in 64
template <class T>
constexpr int kPositions = 32 * kCells<T>;
template <class T>
constexpr int kMaxRows = sizeof(T) == 8 ? 4 : 8;  // rows of S a warp: up to 64 sums a lane

// A nonzero as the inner loop takes it: its value and the distance in bytes from a position's cell to the cell it
// reads.
template <class A>
struct alignas(2 * sizeof(A)) Entry {
  A value;
  int offset;
};

// Rows of S, or of S^T as build_channel_rows leaves it; row i starts at row_ptr[i * row_step].
template <class T>
struct Rows {
  const T* values;
  const int32_t *row_ptr, *col_idx;
  int row_step;
};

// axis ---------------------------------------------------------------------------------------------------------------

struct Axis {
  int kernel, stride, pad, dilation;
  int source, out;            // pixels
  int transposed;             // the source is dy and the output dx
  int phases, positions;      // positions of phase 0; a later phase may have one less
  int read_phases;            // phases whose positions some tap reads for
  int source_step, out_step;  // pixels from one position to the next
  int period, jump;           // taps k and k + period read one slot, `jump` rows apart
  int slots, reach;           // a tile of n positions stages up to n + reach rows of each slot
};

inline Axis make_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in, int64_t out,
                      bool transposed) {
  Axis a;
  a.kernel = int(kernel), a.stride = int(stride), a.pad = int(pad), a.dilation = int(dilation);
  a.source = int(transposed ? out : in), a.out = int(transposed ? in : out);
  const int common = std::gcd(a.stride, a.dilation);
  a.transposed = transposed;
  a.phases = transposed ? std::min(a.stride, a.out) : 1;
  a.positions = transposed ? int(gpu::ceil_div(in, stride)) : a.out;
  a.source_step = transposed ? 1 : a.stride;
  a.out_step = transposed ? a.stride : 1;
  a.period = a.stride / common;
  a.jump = a.dilation / common;
  a.slots = transposed ? 1 : std::min(a.kernel, a.period);
  a.read_phases = transposed ? std::min({a.kernel, a.period, a.phases}) : 1;
  a.reach = (a.kernel - 1) / a.period * a.jump;
  return a;
}

// An axis as the positions of one phase see it.
struct Phase {
  int positions, out_first;
  int source_first;   // the pixel in row 0 of slot 0 for position 0
  int residue, last;  // transposed: taps residue + i * period, i <= last, are read; residue -1: none is
};

__device__ inline Phase phase_of(const Axis& a, int phase) {
  if (!a.transposed) return {a.positions, 0, -a.pad, 0, 0};
  const int positions = (a.out - phase + a.stride - 1) / a.stride;
  for (int k = 0; k < min(a.period, a.kernel); ++k) {
    if ((phase + a.pad - k * a.dilation) % a.stride != 0) continue;
    const int last = (a.kernel - 1 - k) / a.period;
    return {positions, phase, (phase + a.pad - (k + last * a.period) * a.dilation) / a.stride, k, last};
  }
  return {positions, phase, 0, -1, 0};
}

// The slot and the row of it, counted from a position's own, that a tap reads. Slot -1: no position of the phase.
struct Place {
  int slot, row;
};

__device__ inline Place place_of(const Axis& a, const Phase& phase, int tap) {
  const int i = tap / a.period, residue = tap - i * a.period;
  if (!a.transposed) return {residue, i * a.jump};
  return residue == phase.residue ? Place{0, (phase.last - i) * a.jump} : Place{-1, 0};
}

__device__ inline int source_pixel(const Axis& a, const Phase& phase, int slot, int row) {
  return row * a.source_step + phase.source_first + slot * a.dilation;
}

// plan ---------------------------------------------------------------------------------------------------------------

struct Plan {
  Axis h, w;
  int batch, groups, taps;
  int source_channels, out_channels;             // per group
  int tile_h, tile_w, tile_images;               // a tile, in positions
  int tiles_h, tiles_w, tiles, packs;            // tiles of a map; of the batch; packs of kPack tiles
  int extent_h, extent_w, pitch, image_cells;    // a staged slot: rows, columns; cells to the next row, image
  int slot_cells, channel_cells, staged;         // cells to the next slot, channel; cells of one filled
  int block_channels;                            // staged together
  int warp_rows, warps, block_rows, row_blocks;  // rows of S a warp; of a CTA; CTAs for a group's rows
  int shared_bytes;
  bool tiled;  // else the direct kernels

  __host__ __device__ int phases() const { return h.phases * w.phases; }
  int64_t blocks() const { return int64_t(row_blocks) * packs * groups * phases(); }
};

// The tile of at most `limit` positions with the least work: tiles times (multiplying + staging). Multiplying a tile by
// a channel's nonzeros takes about as long as staging 400 cells where 64 rows of S have density 5 %; each row of a tile
// begins with a further sector of memory, as much as 8 cells.
inline void choose_tile(Plan& p, int limit) {
  const auto even = [](int64_t count, int64_t most) {  // the size of the largest of ceil(count / most) equal parts
    return int(gpu::ceil_div(count, gpu::ceil_div(count, most)));
  };
  int64_t least = LLONG_MAX;
  for (int width = 1; width <= std::min(p.w.positions, limit); ++width) {
    if (even(p.w.positions, width) != width) continue;
    const int height = even(p.h.positions, std::min(p.h.positions, limit / width));
    const bool whole = width == p.w.positions && height == p.h.positions;
    const int images = whole ? even(p.batch, std::min(p.batch, limit / (width * height))) : 1;
    const int64_t tiles_h = gpu::ceil_div(p.h.positions, height), tiles_w = gpu::ceil_div(p.w.positions, width);
    const int64_t tiles = tiles_h * tiles_w * gpu::ceil_div(p.batch, images);
    const int64_t cells = int64_t(p.h.slots) * p.w.slots * images * (height + p.h.reach) * (width + p.w.reach + 8);
    if (tiles * (400 + cells) >= least) continue;
    least = tiles * (400 + cells);
    p.tile_h = height, p.tile_w = width, p.tile_images = images;
    p.tiles_h = int(tiles_h), p.tiles_w = int(tiles_w), p.tiles = int(tiles);
  }
}

inline bool free_of_conflicts(const Plan& p, int pitch, int image_cells) {
  unsigned seen = 0;
  for (int at = 0; at < p.tile_images * p.tile_h * p.tile_w; ++at) {
    const int row = at / p.tile_w, image = row / p.tile_h;
    if (at % 8 == 0) seen = 0;
    const unsigned group = 1u << (image * image_cells + row % p.tile_h * pitch + at % p.tile_w) % 8;
    if (seen & group) return false;
    seen |= group;
  }
  return true;
}

// The smallest pitches without bank conflicts. A pitch congruent to tile_w and images congruent to tile_h * tile_w
// modulo 8 always are, so there is one.
inline void choose_pitch(Plan& p) {
  p.extent_h = p.tile_h + p.h.reach, p.extent_w = p.tile_w + p.w.reach;
  p.image_cells = INT_MAX;
  for (int pitch = p.extent_w; pitch < p.extent_w + 8; ++pitch)
    for (int pad = 0; pad < (p.tile_images > 1 ? 8 : 1); ++pad) {
      const int cells = p.extent_h * pitch + pad;
      if (cells >= p.image_cells || !free_of_conflicts(p, pitch, cells)) continue;
      p.pitch = pitch, p.image_cells = cells;
    }
  const int slots = p.h.slots * p.w.slots;
  p.slot_cells = p.tile_images * p.image_cells;
  p.channel_cells = slots * p.slot_cells;
  p.staged = slots * p.tile_images * p.extent_h * p.extent_w;
}

// As many rows a warp as the rows fill and as still leave three CTAs for two multiprocessors: x is staged once for all
// rows of a CTA.
inline void choose_rows(Plan& p, int most) {
  const int64_t enough = 3 * int64_t(gpu::multiprocessors()) / 2;
  for (p.warp_rows = most;; p.warp_rows /= 2) {
    p.row_blocks = int(gpu::ceil_div(p.out_channels, kMaxWarps * p.warp_rows));
    if (p.warp_rows == 1 || (p.out_channels > kMaxWarps * p.warp_rows / 2 && p.blocks() >= enough)) break;
  }
  p.block_rows = int(gpu::ceil_div(p.out_channels, p.row_blocks));
  p.warps = int(gpu::ceil_div(p.block_rows, p.warp_rows));
}

// A tile's first position, and the first that it owns; image -1: beyond the last tile.
struct TileAt {
  int image, row, col, own_row, own_col;
};

// Of `channels` channels in the parts of Shared.
template <class T>
int64_t shared_bytes(const Plan& p, int64_t channels) {
  return channels * (p.channel_cells * int64_t(sizeof(Cell<T>)) + p.taps * 4) +
         p.warps * 32 * int64_t(sizeof(Entry<gpu::Acc<T>>)) + kPack<T> * int64_t(sizeof(TileAt)) +
         2 * int64_t(sizeof(Phase)) + p.staged * (kPack<T> + 1ll) * 4;
}

// Channels that a warp stages at once: 8 loads in flight a lane.
template <class T>
constexpr int kStagedChannels = 8 / kPack<T>;

// As many channels as leave room for two CTAs on a multiprocessor, a multiple of what its warps stage at once.
template <class T>
bool choose_channels(Plan& p) {
  const int half = std::clamp((gpu::max_shared_bytes() - 2048) / 2, kLeastSharedBytes, kMostSharedBytes);
  const int64_t one = shared_bytes<T>(p, 1), each = shared_bytes<T>(p, 2) - one;
  if (one > std::min(half, gpu::max_shared_bytes())) return false;
  const int unit = p.warps * kStagedChannels<T>;
  const int64_t fit = std::min<int64_t>(p.source_channels, 1 + (half - one) / each);
  p.block_channels = int(fit < p.source_channels && fit > unit ? fit / unit * unit : fit);
  p.shared_bytes = int(shared_bytes<T>(p, p.block_channels));
  return true;
}

// transposed: the source is dy, the output dx, and the rows are those of S^T.
template <class T>
Plan make_plan(const ConvShape& s, bool transposed, int64_t nnz) {
  Plan p{};
  p.h = make_axis(s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.in_h, s.out_h, transposed);
  p.w = make_axis(s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.in_w, s.out_w, transposed);
  p.batch = int(s.batch), p.groups = int(s.groups), p.taps = int(s.kernel_h * s.kernel_w);
  p.source_channels = int((transposed ? s.out_channels : s.in_channels) / s.groups);
  p.out_channels = int((transposed ? s.in_channels : s.out_channels) / s.groups);
  if (nnz == 0 || p.batch == 0 || p.h.positions == 0 || p.w.positions == 0) return p;

  choose_tile(p, kPositions<T>);
  p.packs = int(gpu::ceil_div(p.tiles, kPack<T>));
  choose_rows(p, kMaxRows<T>);
  // 32-bit distances within the images of a pack, a channel's cells in shared memory, and enough nonzeros: staging a
  // cell for a channel, its share of the prologue, and multiplying by a nonzero are as 1 : 5 kPack : 25, and a nonzero
  // in the direct kernel is 165 (instructions a warp, not measured).
  const int64_t cells =
      (p.tile_h + int64_t(p.h.reach)) * (p.tile_w + int64_t(p.w.reach)) * p.tile_images * p.h.slots * p.w.slots;
  const int64_t image = int64_t(p.groups) * p.source_channels * p.h.source * p.w.source;
  const int64_t images = (kPack<T> / (p.tiles_h * p.tiles_w) + 2) * int64_t(p.tile_images);
  const int64_t stagings = int64_t(p.groups) * p.row_blocks * p.h.read_phases * p.w.read_phases;
  if (image * images * int64_t(sizeof(T)) > INT_MAX || cells * int64_t(sizeof(Cell<T>)) > kMostSharedBytes) return p;
  if (140 * nnz < stagings * cells * (5 * kPack<T> + p.source_channels)) return p;
  choose_pitch(p);
  p.tiled = choose_channels<T>(p);
  return p;
}

// in a kernel --------------------------------------------------------------------------------------------------------

// The parts of dynamic shared memory.
template <class T>
struct Shared {
  Cell<T>* cells;               // [block_channels, channel_cells]
  Entry<gpu::Acc<T>>* entries;  // [warps, 32]
  TileAt* tiles;                // [kPack]
  Phase *h, *w;
  int* source;  // [kPack, staged]: the distance in bytes to a staged cell's element, -1: zero
  int* target;  // [staged]: the cell
  int* taps;    // [block_channels * taps]: an entry's offset for a column, -1: not of this phase

  __device__ Shared(unsigned char* memory, const Plan& p)
      : cells(reinterpret_cast<Cell<T>*>(memory)),
        entries(reinterpret_cast<Entry<gpu::Acc<T>>*>(cells + p.block_channels * p.channel_cells)),
        tiles(reinterpret_cast<TileAt*>(entries + p.warps * 32)),
        h(reinterpret_cast<Phase*>(tiles + kPack<T>)),
        w(h + 1),
        source(reinterpret_cast<int*>(w + 1)),
        target(source + kPack<T> * p.staged),
        taps(target + p.staged) {}
};

__device__ inline TileAt tile_at(const Plan& p, const Phase& h, const Phase& w, int index) {
  if (index >= p.tiles) return {-1, 0, 0, 0, 0};
  const int above = index / p.tiles_w, image = above / p.tiles_h;
  const int row = (above - image * p.tiles_h) * p.tile_h, col = (index - above * p.tiles_w) * p.tile_w;
  return {image * p.tile_images, max(0, min(row, h.positions - p.tile_h)), max(0, min(col, w.positions - p.tile_w)),
          row, col};
}

// Fills shared.tiles, source and target for a pack. Barriers: one inside; one must follow.
template <class T>
__device__ __forceinline__ void locate(const Shared<T>& shared, const Plan& p, int pack) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const Phase h = *shared.h, w = *shared.w;
  if (thread < kPack<T>) shared.tiles[thread] = tile_at(p, h, w, pack * kPack<T> + thread);
  __syncthreads();
  const int pixels = p.h.source * p.w.source, image_size = p.groups * p.source_channels * pixels;
  for (int at = thread; at < p.staged; at += threads) {
    // Slots of columns vary fastest, so that lanes read neighbouring pixels for any stride.
    const int width = p.extent_w * p.w.slots, line = at / width, in_line = at - line * width;
    const int col = in_line / p.w.slots, slot_w = in_line - col * p.w.slots;
    const int frame = line / p.extent_h, row = line - frame * p.extent_h;
    const int slot_h = frame / p.tile_images, image = frame - slot_h * p.tile_images;
    shared.target[at] = (slot_h * p.w.slots + slot_w) * p.slot_cells + image * p.image_cells + row * p.pitch + col;
    for (int i = 0; i < kPack<T>; ++i) {
      const TileAt tile = shared.tiles[i];
      const int y = source_pixel(p.h, h, slot_h, tile.row + row), x = source_pixel(p.w, w, slot_w, tile.col + col);
      const bool inside = tile.image >= 0 && tile.image + image < p.batch && unsigned(y) < unsigned(p.h.source) &&
                          unsigned(x) < unsigned(p.w.source);
      const int images = tile.image - shared.tiles[0].image + image;
      shared.source[i * p.staged + at] = inside ? (images * image_size + y * p.w.source + x) * int(sizeof(T)) : -1;
    }
  }
}

// Fills shared.h, w and taps. Barriers: one inside; one must follow.
template <class T>
__device__ __forceinline__ void place_taps(const Shared<T>& shared, const Plan& p, int phase) {
  if (threadIdx.x == 0) {
    *shared.h = phase_of(p.h, phase / p.w.phases);
    *shared.w = phase_of(p.w, phase % p.w.phases);
  }
  __syncthreads();
  const Phase h = *shared.h, w = *shared.w;
  for (int at = threadIdx.x; at < p.block_channels * p.taps; at += blockDim.x) {
    const int channel = at / p.taps, tap = at - channel * p.taps, tap_h = tap / p.w.kernel;
    const Place y = place_of(p.h, h, tap_h), x = place_of(p.w, w, tap - tap_h * p.w.kernel);
    const int cell = channel * p.channel_cells + (y.slot * p.w.slots + x.slot) * p.slot_cells + y.row * p.pitch + x.row;
    shared.taps[at] = y.slot < 0 || x.slot < 0 ? -1 : cell * int(sizeof(Cell<T>));
  }
}

// The first channel of a group in the pack's first image, from which shared.source counts. After locate.
template <class T>
__device__ __forceinline__ const T* first_plane(const T* source, const Shared<T>& shared, const Plan& p, int group) {
  const int64_t plane = (int64_t(shared.tiles[0].image) * p.groups + group) * p.source_channels;
  return source + plane * p.h.source * p.w.source;
}

// A warp's rows of S: the first, of all groups, and how many.
struct WarpRows {
  int first, count;
};

template <int kRows>
__device__ __forceinline__ WarpRows warp_rows(const Plan& p, int group, int row_block) {
  const int in_block = threadIdx.x / 32 * kRows, in_group = row_block * p.block_rows + in_block;
  return {group * p.out_channels + in_group, min(kRows, min(p.block_rows - in_block, p.out_channels - in_group))};
}

// Copies `channels` planes to the cells; `source` is the first of them in the pack's first image. The warps share out
// the pairs (32 cells, kStagedChannels channels).
template <class T>
__device__ __forceinline__ void stage(const T* source, int channels, const Shared<T>& shared, const Plan& p) {
  constexpr int kMany = kStagedChannels<T>;
  const int pixels = p.h.source * p.w.source, runs = (channels + kMany - 1) / kMany;
  int at = threadIdx.x % 32, run = threadIdx.x / 32;
  for (;; run += p.warps) {
    for (; run >= runs; run -= runs) at += 32;
    if (at >= p.staged) break;
    const int channel = run * kMany;
    const char* plane[kMany];
#pragma unroll
    for (int u = 0; u < kMany; ++u)
      plane[u] = reinterpret_cast<const char*>(source + int64_t(min(channel + u, channels - 1)) * pixels);
    Cell<T> cell[kMany];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const int from = shared.source[i * p.staged + at];
#pragma unroll
      for (int u = 0; u < kMany; ++u)
        cell[u].tile[i] = from >= 0 ? *reinterpret_cast<const T*>(plane[u] + from) : gpu::narrow<T>(gpu::Acc<T>(0));
    }
    Cell<T>* to = shared.cells + channel * p.channel_cells + shared.target[at];
#pragma unroll
    for (int u = 0; u < kMany; ++u)
      if (channel + u < channels) to[u * p.channel_cells] = cell[u];
  }
}

// Takes a warp's rows of S through all channels, a staged block at a time. For each run of up to 32 nonzeros of row r
// it leaves the warp's entries in shared memory and calls visit(r, count, index of the first); r is a constant after
// unrolling, so visit may index registers with it. As columns ascend, a row's nonzeros in the block are those from its
// cursor up to a ballot; lane r keeps the cursor and the end of row r.
template <int kRows, bool kWithValues, class T, class Visit>
__device__ __forceinline__ void walk(const T* source, const Rows<T>& s, const WarpRows& rows, const Shared<T>& shared,
                                     const Plan& p, const Visit& visit) {
  const int lane = threadIdx.x % 32, pixels = p.h.source * p.w.source;
  Entry<gpu::Acc<T>>* entries = shared.entries + threadIdx.x / 32 * 32;
  const int32_t* bounds = s.row_ptr + int64_t(rows.first + lane) * s.row_step;
  int cursor = lane < rows.count ? bounds[0] : 0;
  const int end = lane < rows.count ? bounds[s.row_step] : 0;

  for (int channel = 0; channel < p.source_channels; channel += p.block_channels) {
    const int channels = min(p.block_channels, p.source_channels - channel);
    const int first_col = channel * p.taps, end_col = first_col + channels * p.taps;
    int col[kRows];
    T value[kRows];
    const auto load = [&](int r) {
      const int at = __shfl_sync(~0u, cursor, r) + lane;
      const bool in_row = at < __shfl_sync(~0u, end, r);
      col[r] = in_row ? s.col_idx[at] : INT_MAX;
      if (kWithValues) value[r] = in_row ? s.values[at] : gpu::narrow<T>(gpu::Acc<T>(0));
    };
    // Loaded before the block is staged, so that the latency is hidden behind it.
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      load(r);
      any |= col[r] < end_col;
    }
    if (!__syncthreads_or(any)) continue;
    stage(source + int64_t(channel) * pixels, channels, shared, p);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (;;) {
        const unsigned taken = __ballot_sync(~0u, col[r] < end_col);
        if (taken == 0) break;
        const int offset = col[r] < end_col ? shared.taps[col[r] - first_col] : -1;
        const unsigned read = __ballot_sync(~0u, offset >= 0);
        if (offset >= 0) {
          Entry<gpu::Acc<T>>& entry = entries[__popc(read & ((1u << lane) - 1))];
          entry.offset = offset;
          if (kWithValues) entry.value = gpu::widen(value[r]);
        }
        __syncwarp();
        visit(r, __popc(read), kWithValues ? 0 : __shfl_sync(~0u, cursor, r));
        __syncwarp();
        if (lane == r) cursor += __popc(taken);
        if (taken != ~0u) break;
        load(r);
      }
    }
  }
}

// The cells of a lane's positions; a lane beyond the tile repeats position 0.
template <class T>
__device__ __forceinline__ const unsigned char* cell_of(const Shared<T>& shared, const Plan& p, int position) {
  if (position >= p.tile_images * p.tile_h * p.tile_w) position = 0;
  const int line = position / p.tile_w, image = line / p.tile_h;
  const int cell = image * p.image_cells + (line - image * p.tile_h) * p.pitch + position - line * p.tile_w;
  return reinterpret_cast<const unsigned char*>(shared.cells + cell);
}

// Where the output has channel `channel` (of all groups) of a tile's position; -1 where the tile doesn't own it.
template <class T>
__device__ __forceinline__ int64_t output_of(const Shared<T>& shared, const Plan& p, int tile_index, int position,
                                             int channel) {
  const TileAt tile = shared.tiles[tile_index];
  const Phase h = *shared.h, w = *shared.w;
  const int line = position / p.tile_w, image = line / p.tile_h;
  const int row = tile.row + line - image * p.tile_h, col = tile.col + position - line * p.tile_w;
  if (image >= p.tile_images || tile.image < 0 || tile.image + image >= p.batch) return -1;
  if (row < tile.own_row || row >= h.positions || col < tile.own_col || col >= w.positions) return -1;
  const int pixel = (row * p.h.out_step + h.out_first) * p.w.out + col * p.w.out_step + w.out_first;
  return (int64_t(tile.image + image) * p.groups * p.out_channels + channel) * p.h.out * p.w.out + pixel;
}

}  // namespace cmd_ext::cuda::conv
