// topk_csr: the exactly nnz largest |a| of a matrix, straight into CSR; transpose_csr: its support by columns.
//
// Magnitudes of IEEE numbers order like their bit patterns without the sign: the key of an entry. A fixed sample of
// 3 sqrt(count) entries gives a bracket [low, high] of keys that holds the nnz-th largest but for one case in
// 10^4. Then
//
//   gather   one read of a compresses what may be kept, every key >= low with its column, into scratch (about 1.1 nnz);
//   select   a histogram of the candidates in the bracket, then nth_element within the one bucket that matters;
//   write    what passes the threshold goes from scratch to the CSR, which keeps the order of a.
//
// Scratch holds at most 0.6 count entries and a block per thread; up to 64 MB are kept between calls, as fresh pages
// would cost more than the rest. Where more than a fifth of a would pass (nnz near count, ties) gather keeps the
// candidates of the bracket alone and counts the larger ones, and write reads a again; a bracket of one key is only
// counted. Where the bracket missed, or is a cluster of more than 0.4 count, the threshold comes from radix select over
// a: one read for each 11 bits of the key, without storage; with the reads before and after it 6 for float.
//
// Compression is 8 floats or 4 doubles at a time with AVX2: the mask of the comparison looks up the lanes to move, and
// whole vectors are stored, the tail of each overwritten by the next. No branch depends on the data, so that the time
// is the same at any density: 0.2 to 0.3 ns an entry and thread on Zen 3 and 4, two stores that cross cache lines per
// vector. (AVX-512's own compression took as long on Zen 4: as many bytes stored, with masks on top.) Where at most
// kFew pass, gather moves them one by one: a word of bits tells which of 64, which costs 0.07 ns an entry at a density
// of 1 %, 0.1 at 5 % and 0.17 at 12 %.
//
// Every piece (one a thread) has its own scratch, counts and output range: the result is that of a stable sort. Threads
// share gather; what follows looks at the candidates alone and is shared only where they are many, as waking a thread
// costs more than 10^5 of them.
//
// The transpose is a counting sort by column: two passes over the nonzeros in their order, which makes it stable.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cmd_ext::cpu {
namespace {

constexpr int kBucketBits = 11, kBuckets = 1 << kBucketBits;
constexpr int64_t kBlock = 4096;        // entries that are handled together, in the first-level cache
constexpr int64_t kSmall = 1024;        // up to here nth_element needs no help
constexpr double kMostKept = 0.2;       // share of a that gather may keep with columns, but for chance
constexpr double kMostBetween = 0.4;    // and the candidates of the bracket alone
constexpr double kRoom = 1.3;           // for the candidates, in times of those that the sample promises
constexpr double kMostRoom = 0.6;       // where that does not do for a piece: share of it
constexpr double kFew = 0.14;           // share of a up to which entries are moved one by one, 8 at once
constexpr double kFour = 0.08;          // 4 at once
constexpr double kTwo = 0.02;           // 2 at once
constexpr int64_t kParallel = 1 << 17;  // fewer entries are not worth waking threads (10 to 40 us)
using Histogram = std::array<int64_t, kBuckets>;

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr Key<T> kMagnitude = std::numeric_limits<Key<T>>::max();  // all bits but the sign
template <class T>
constexpr Key<T> kNan = sizeof(T) == 4 ? Key<T>(0x7f800001) : Key<T>(0x7ff0000000000001);

template <class T>
SIMD_INLINE Key<T> magnitude_bits(T value) {
  Key<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & kMagnitude<T>;
}
template <class T>
SIMD_INLINE Key<T> key_of(T value) {
  return std::min(magnitude_bits(value), kNan<T>);  // all NaN tie, whatever their payload
}
// magnitude_bits(x) > limit(key) holds just where key_of(x) > key.
template <class T>
Key<T> limit(Key<T> key) {
  return key < kNan<T> ? key : kMagnitude<T>;
}

// Magnitude bits in (below, top].
template <class T>
struct Range {
  Key<T> below, top;

  static Range at_least(Key<T> key) { return {Key<T>(key - 1), kMagnitude<T>}; }
  static Range above(Key<T> key) { return {limit<T>(key), kMagnitude<T>}; }
  static Range between(Key<T> low, Key<T> high) { return {Key<T>(low - 1), limit<T>(high)}; }
  bool holds(Key<T> bits) const { return bits > below && bits <= top; }
};

// Entries in a row: their values, and their columns if they are not consecutive.
template <class T>
struct Source {
  const T* values;
  int64_t count;
  const int32_t* cols = nullptr;
  int32_t first_col = 0;

  Source part(int64_t begin, int64_t end) const {
    return {values + begin, end - begin, cols ? cols + begin : nullptr, int32_t(first_col + begin)};
  }
};

// Room for `room` entries; without columns if cols is null.
template <class T>
struct Target {
  T* values;
  int32_t* cols;
  int64_t room;
};

enum class Columns { none, counted, given };

template <Columns kColumns, class T>
inline int64_t compress_scalar(Source<T> in, int64_t begin, int64_t end, Range<T> range, Target<T> out, int64_t found) {
  for (int64_t j = begin; j < end; ++j) {
    if (!range.holds(magnitude_bits(in.values[j]))) continue;
    out.values[found] = in.values[j];
    if constexpr (kColumns == Columns::counted) out.cols[found] = in.first_col + int32_t(j);
    if constexpr (kColumns == Columns::given) out.cols[found] = in.cols[j];
    ++found;
  }
  return found;
}

#if defined(__x86_64__)

// The lanes of a mask's bits, one a byte, lowest first; and of a mask of 4, as pairs of 32-bit lanes.
constexpr std::array<uint64_t, 256> kLanesOfMask = [] {
  std::array<uint64_t, 256> table{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 7; lane >= 0; --lane)
      if (mask >> lane & 1) table[mask] = table[mask] << 8 | uint64_t(lane);
  return table;
}();
constexpr std::array<uint64_t, 16> kPairsOfMask = [] {
  std::array<uint64_t, 16> table{};
  for (int mask = 0; mask < 16; ++mask)
    for (int lane = 3; lane >= 0; --lane)
      if (mask >> lane & 1) table[mask] = table[mask] << 16 | uint64_t(2 * lane + 1) << 8 | uint64_t(2 * lane);
  return table;
}();

template <class T>
__attribute__((target("avx2"), always_inline)) inline __m256i broadcast(Key<T> key) {
  if constexpr (sizeof(T) == 4)
    return _mm256_set1_epi32(key);
  else
    return _mm256_set1_epi64x(key);
}

// The arguments are copied, as a store of __m256i might change anything that they point to.
template <Columns kColumns, class T>
__attribute__((target("avx2,popcnt"))) int64_t compress_avx2(Source<T> in, Range<T> range, Target<T> out) {
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kWidth = simd::kLanes<T>;
  const __m256i magnitude = broadcast<T>(kMagnitude<T>);
  const __m256i below = broadcast<T>(range.below), top = broadcast<T>(range.top);
  const __m256i first_col = _mm256_set1_epi32(in.first_col);
  int64_t found = 0, j = 0;
  for (; j + kWidth <= in.count; j += kWidth) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.values + j));
    const __m256i bits = _mm256_and_si256(raw, magnitude);
    unsigned mask;
    if constexpr (kFloat) {
      const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(bits, top), _mm256_cmpgt_epi32(bits, below));
      mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
    } else {
      const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi64(bits, top), _mm256_cmpgt_epi64(bits, below));
      mask = unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(inside)));
    }
    if (found + kWidth > out.room) {  // a whole vector would reach beyond, into what another thread writes
      if (mask) found = compress_scalar<kColumns>(in, j, j + kWidth, range, out, found);
      continue;
    }
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kLanesOfMask[mask])));
    __m256i moves = lanes;
    if constexpr (!kFloat) moves = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kPairsOfMask[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.values + found), _mm256_permutevar8x32_epi32(raw, moves));
    if constexpr (kColumns != Columns::none) {
      __m256i cols;
      if constexpr (kColumns == Columns::counted)
        cols = _mm256_add_epi32(lanes, _mm256_add_epi32(first_col, _mm256_set1_epi32(int32_t(j))));
      else if constexpr (kFloat)
        cols = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.cols + j));
      else
        cols = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in.cols + j)));
      if constexpr (kColumns == Columns::given) cols = _mm256_permutevar8x32_epi32(cols, lanes);
      if constexpr (kFloat)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.cols + found), cols);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out.cols + found), _mm256_castsi256_si128(cols));
    }
    found += __builtin_popcount(mask);
  }
  return compress_scalar<kColumns>(in, j, in.count, range, out, found);
}

// A bit for each of 64 entries, 1 where its magnitude is above `below`.
template <class T>
__attribute__((target("avx2"), always_inline)) inline uint64_t above_of_64(const T* a, __m256i magnitude,
                                                                           __m256i below) {
  constexpr int kWidth = simd::kLanes<T>;
  const auto bits = [&](int i) __attribute__((target("avx2"), always_inline)) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * kWidth)), magnitude);
  };
  uint64_t word = 0;
  if constexpr (sizeof(T) == 8) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      word |= uint64_t(unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(bits(i), below))))) << 4 * i;
  } else {  // four comparisons narrowed to bytes share one movemask; narrowing leaves groups of 4 entries out of order
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      const __m256i low =
          _mm256_packs_epi32(_mm256_cmpgt_epi32(bits(i), below), _mm256_cmpgt_epi32(bits(i + 1), below));
      const __m256i high =
          _mm256_packs_epi32(_mm256_cmpgt_epi32(bits(i + 2), below), _mm256_cmpgt_epi32(bits(i + 3), below));
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      word |= uint64_t(uint32_t(_mm256_movemask_epi8(bytes))) << 8 * i;
    }
  }
  return word;
}

// Entries above range.below, of which there should be few: a word of bits tells which of 64, and those are moved one by
// one. kAtOnce of them are moved whatever the word holds, so that its count seldom decides a branch. out.room >=
// in.count.
template <int kAtOnce, class T>
__attribute__((target("avx2,popcnt"))) int64_t compress_few_avx2(Source<T> in, Range<T> range, Target<T> out) {
  const __m256i magnitude = broadcast<T>(kMagnitude<T>), below = broadcast<T>(range.below);
  int64_t found = 0, j = 0;
  for (; j + 64 <= in.count; j += 64) {
    uint64_t word = above_of_64(in.values + j, magnitude, below);
    const int passed = __builtin_popcountll(word);
    for (int done = 0; done < passed || done == 0; done += kAtOnce) {
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const int lane = __builtin_ctzll(word | uint64_t(1) << 63);
        out.values[found + done + i] = in.values[j + lane];
        out.cols[found + done + i] = in.first_col + int32_t(j) + lane;
        word &= word - 1;
      }
    }
    found += passed;
  }
  return compress_scalar<Columns::counted>(in, j, in.count, range, out, found);
}

#endif

// Moves the entries of `in` within the range to `out`, in their order; `out` has room for them. Returns their number.
template <Columns kColumns, class T>
int64_t compress(const Source<T>& in, Range<T> range, const Target<T>& out) {
#if defined(__x86_64__)
  if (simd::isa() != simd::Isa::scalar) return compress_avx2<kColumns>(in, range, out);
#endif
  return compress_scalar<kColumns>(in, 0, in.count, range, out, 0);
}

// compress with counted columns where the small `share` passes and the range has no end; out.room >= in.count.
template <class T>
int64_t compress_few(const Source<T>& in, Range<T> range, const Target<T>& out, [[maybe_unused]] double share) {
#if defined(__x86_64__)
  if (simd::isa() != simd::Isa::scalar)
    return share <= kTwo    ? compress_few_avx2<2>(in, range, out)
           : share <= kFour ? compress_few_avx2<4>(in, range, out)
                            : compress_few_avx2<8>(in, range, out);
#endif
  return compress_scalar<Columns::counted>(in, 0, in.count, range, out, 0);
}

template <class T>
int64_t count_within(const T* values, int64_t count, Range<T> range) {
  int64_t total = 0;
  simd::run([&, range] SIMD_LAMBDA() {
    const Key<T> below = range.below, top = range.top;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = std::min(count, begin + kBlock);
      Key<T> within = 0;
      for (int64_t i = begin; i < end; ++i) {
        const Key<T> bits = magnitude_bits(values[i]);
        within += Key<T>(bits > below) & Key<T>(bits <= top);
      }
      total += within;
    }
  });
  return total;
}

// The part of one thread: the entries [begin, end) of a.
template <class T>
struct Piece {
  int64_t begin, end;
  Target<T> kept = {};              // where gather puts what it keeps
  std::vector<int64_t> row_ends;    // where each row ends in `kept`
  Source<T> candidates;             // where the threshold and its ties are: `kept` or a itself
  int64_t larger = 0;               // entries above all candidates
  int64_t above = 0, equal = 0;     // entries above the threshold and at it
  int64_t ties = 0, first_out = 0;  // how many of the latter are chosen, and where the output begins
};

// Calls body(row, begin, end) for each row of a piece with the entries of the row that are in the piece.
template <class T, class Body>
void for_rows(const Piece<T>& piece, int64_t n, const Body& body) {
  int64_t begin = piece.begin;
  for (int64_t row = begin / n; begin < piece.end; ++row) {
    const int64_t end = std::min(piece.end, (row + 1) * n);
    body(row, begin, end);
    begin = end;
  }
}

// Keys [low, high] that should hold the nnz-th largest.
template <class T>
struct Bracket {
  Key<T> low = 0, high = kNan<T>;
  double share = 1, share_from_low = 1;  // of the sample: within, and from low on
};

// The bounds are 4 standard deviations of the threshold's rank in the sample away from it. One entry is drawn from each
// of `size` equal stretches, at a place given by a hash, so that no period of the data can match the sample's.
template <class T>
Bracket<T> sample_bracket(const T* a, int64_t count, int64_t nnz) {
  const int64_t size = int64_t(3 * std::sqrt(double(count)));
  const int64_t stretch = count / size, reach = std::min<int64_t>(stretch, 1 << 30);
  std::vector<Key<T>> keys(size);
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t hash = (uint64_t(i) * 0x9e3779b97f4a7c15u) >> 32;
    keys[i] = key_of(a[i * stretch + int64_t(hash * uint64_t(reach) >> 32)]);
  }
  const double rank = double(nnz) / double(count) * double(size);
  const double spread = 4 * std::sqrt(rank * (1 - rank / double(size))) + 4;
  Bracket<T> bracket;
  auto end = keys.end();
  for (const double bound : {rank + spread, rank - spread}) {
    if (bound < 0 || bound >= double(size)) continue;
    const auto place = keys.begin() + int64_t(bound);
    std::nth_element(keys.begin(), place, end, std::greater<Key<T>>());
    (bound > rank ? bracket.low : bracket.high) = *place;
    if (bound > rank) end = place;
  }
  int64_t from_low = 0, beyond = 0;
  for (const Key<T> key : keys) {
    from_low += key >= bracket.low;
    beyond += key > bracket.high;
  }
  bracket.share = double(from_low - beyond) / double(size);
  bracket.share_from_low = double(from_low) / double(size);
  return bracket;
}

template <class T>
class Selection {
 public:
  Selection(const T* a, int64_t m, int64_t n, int64_t nnz, const ParallelFor& parallel_for)
      : a_(a), n_(n), count_(m * n), nnz_(nnz), parallel_for_(parallel_for) {
    const int64_t pieces = count_ < kParallel ? 1 : std::max(1, parallel_for.threads);
    pieces_.resize(pieces);
    for (int64_t p = 0; p < pieces; ++p) {
      pieces_[p].begin = count_ / pieces * p;
      pieces_[p].end = p + 1 < pieces ? count_ / pieces * (p + 1) : count_;
    }
  }

  // Finds the threshold and how many ties of it each piece keeps.
  void find() {
    if (count_ > kSmall) {
      const Bracket<T> bracket = sample_bracket(a_, count_, nnz_);
      if (bracket.low == bracket.high) {
        search_all();
        threshold_ = bracket.low;
        if (place()) return;
      } else if (gather(bracket) && select(bracket.low, bracket.high) && place()) {
        return;
      }
    }
    search_all();
    select(0, kNan<T>);
    place();
  }

  void write(T* values, int32_t* row_ptr, int32_t* col_idx) {
    for_pieces(with_cols_ ? candidates() : count_, [&](Piece<T>& piece) {
      const bool gathered = with_cols_;
      const Source<T> source = gathered ? piece.candidates : Source<T>{a_ + piece.begin, piece.end - piece.begin};
      const int64_t cut = end_of_ties(piece, source), stop = piece.first_out + piece.above + piece.ties;
      int64_t out = piece.first_out, done = 0, index = 0;
      for_rows(piece, n_, [&](int64_t row, int64_t begin, int64_t end) {
        const int64_t row_end = gathered ? piece.row_ends[index++] : end - piece.begin;
        const int64_t middle = std::clamp(cut, done, row_end);
        const int32_t shift = int32_t(begin - row * n_ - done);
        for (auto [from, to, range] : {std::tuple{done, middle, Range<T>::at_least(threshold_)},
                                       std::tuple{middle, row_end, Range<T>::above(threshold_)}}) {
          if (from == to) continue;
          Source<T> in = source.part(from, to);
          const Target<T> target{values + out, col_idx + out, stop - out};
          if (!gathered) in.first_col += shift;
          out += gathered ? compress<Columns::given>(in, range, target) : compress<Columns::counted>(in, range, target);
        }
        done = row_end;
        if (end == (row + 1) * n_) row_ptr[row + 1] = int32_t(out);
      });
    });
  }

 private:
  // body(piece) for each piece; `entries` are looked at in all.
  template <class Body>
  void for_pieces(int64_t entries, const Body& body) {
    if (pieces_.size() == 1 || entries < kParallel) {
      for (Piece<T>& piece : pieces_) body(piece);
      return;
    }
    parallel_for_(int64_t(pieces_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) body(pieces_[p]);
    });
  }

  int64_t candidates() const {
    int64_t total = 0;
    for (const Piece<T>& piece : pieces_) total += piece.candidates.count;
    return total;
  }

  // Makes all of a the candidates.
  void search_all() {
    with_cols_ = false;
    for (Piece<T>& piece : pieces_) {
      piece.candidates = {a_ + piece.begin, piece.end - piece.begin};
      piece.larger = piece.above = 0;
    }
  }

  // Reads a for the candidates; false if they are too many. Those of one piece may be many more than their share.
  bool gather(const Bracket<T>& bracket) {
    with_cols_ = bracket.share_from_low <= kMostKept;
    const double share = with_cols_ ? bracket.share_from_low : bracket.share;
    return share <= kMostBetween && (gather(bracket, kRoom * share) || gather(bracket, kMostRoom));
  }

  // room: a share of each piece.
  bool gather(const Bracket<T>& bracket, double room) {
    const Range<T> range = with_cols_ ? Range<T>::at_least(bracket.low) : Range<T>::between(bracket.low, bracket.high);
    reserve(room);
    std::atomic<bool> granted = true;
    for_pieces(count_, [&](Piece<T>& piece) {
      const Target<T>& kept = piece.kept;
      int64_t found = 0;
      piece.larger = 0;
      piece.row_ends.clear();
      for_rows(piece, n_, [&](int64_t row, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end && granted; block += kBlock) {
          const Source<T> in{a_ + block, std::min(kBlock, end - block), nullptr, int32_t(block - row * n_)};
          if (found + in.count > kept.room) {
            granted = false;
            break;
          }
          const Target<T> target{kept.values + found, kept.cols + found, kept.room - found};
          if (bracket.share_from_low <= kFew) {
            found += compress_few(in, range, target, bracket.share_from_low);
          } else if (with_cols_) {
            found += compress<Columns::counted>(in, range, target);
          } else {
            found += compress<Columns::none>(in, range, target);
            piece.larger += count_within(in.values, in.count, Range<T>::above(bracket.high));
          }
        }
        if (with_cols_) piece.row_ends.push_back(found);
      });
      piece.candidates = {kept.values, found, kept.cols};
    });
    return granted;
  }

  // Scratch for the candidates of each piece, a share of it and a block.
  void reserve(double share) {
    int64_t total = 0;
    for (Piece<T>& piece : pieces_) {
      piece.kept.room = int64_t(share * double(piece.end - piece.begin)) + kBlock;
      total += piece.kept.room;
    }
    scratch_.reset();  // before the new one, which may then take its block
    scratch_ = std::make_unique<Scratch<char>>(Slot::input, total * int64_t(sizeof(T) + sizeof(int32_t)));
    T* values = reinterpret_cast<T*>(scratch_->get());
    auto* cols = reinterpret_cast<int32_t*>(values + total);
    for (Piece<T>& piece : pieces_) {
      piece.kept.values = std::exchange(values, values + piece.kept.room);
      piece.kept.cols = std::exchange(cols, cols + piece.kept.room);
    }
  }

  // Sets the threshold, if it lies in [low, high]. No candidate is below low.
  bool select(Key<T> low, Key<T> high) {
    int64_t inside = 0, rank = nnz_;
    if (high < kNan<T>) count_candidates(Range<T>::above(high));
    for (Piece<T>& piece : pieces_) {
      inside += piece.candidates.count - piece.above;
      rank -= piece.larger + piece.above;
    }
    if (rank < 1 || rank > inside) return false;
    while (low < high && inside > kSmall) {
      const int bits = 64 - __builtin_clzll(uint64_t(high - low)), shift = std::max(0, bits - kBucketBits);
      const Histogram histogram = count_buckets(low, high, shift);
      int64_t bucket = int64_t(high - low) >> shift;
      while (histogram[bucket] < rank) rank -= histogram[bucket--];
      inside = histogram[bucket];
      low += Key<T>(bucket << shift);
      high = low + std::min<Key<T>>(high - low, (Key<T>(1) << shift) - 1);  // no sum beyond the largest key
    }
    threshold_ = low < high ? select_few(low, high, inside, rank) : low;
    return true;
  }

  Histogram count_buckets(Key<T> low, Key<T> high, int shift) {
    const Range<T> range = Range<T>::between(low, high);
    std::vector<Histogram> partial(pieces_.size(), Histogram{});
    for_pieces(candidates(), [&](Piece<T>& piece) {
      Histogram& histogram = partial[&piece - pieces_.data()];
      std::array<T, kBlock> block;
      for (int64_t begin = 0; begin < piece.candidates.count; begin += kBlock) {
        const Source<T> in = piece.candidates.part(begin, std::min(piece.candidates.count, begin + kBlock));
        const int64_t found = compress<Columns::none>(in, range, {block.data(), nullptr, kBlock});
        for (int64_t i = 0; i < found; ++i) ++histogram[(key_of(block[i]) - low) >> shift];
      }
    });
    Histogram total{};
    for (const Histogram& histogram : partial)
      for (int b = 0; b < kBuckets; ++b) total[b] += histogram[b];
    return total;
  }

  // The rank-th largest of the `inside` candidates in [low, high].
  Key<T> select_few(Key<T> low, Key<T> high, int64_t inside, int64_t rank) {
    std::array<T, kSmall> few;
    int64_t found = 0;
    for (const Piece<T>& piece : pieces_)
      found += compress<Columns::none>(piece.candidates, Range<T>::between(low, high),
                                       {few.data() + found, nullptr, inside - found});
    std::nth_element(few.begin(), few.begin() + rank - 1, few.begin() + inside,
                     [](T x, T y) { return key_of(x) > key_of(y); });
    return key_of(few[rank - 1]);
  }

  // piece.above = how many candidates of each piece are within the range.
  void count_candidates(Range<T> range) {
    for_pieces(candidates(), [&](Piece<T>& piece) {
      piece.above = count_within(piece.candidates.values, piece.candidates.count, range);
    });
  }

  // Shares out the output and the ties; false if nnz does not end among the ties of the threshold.
  bool place() {
    int64_t ties = nnz_, out = 0;
    for_pieces(candidates(), [&](Piece<T>& piece) {
      const Source<T>& in = piece.candidates;
      piece.above = piece.larger + count_within(in.values, in.count, Range<T>::above(threshold_));
      piece.equal = count_within(in.values, in.count, Range<T>::between(threshold_, threshold_));
    });
    for (const Piece<T>& piece : pieces_) ties -= piece.above;
    if (ties < 1) return false;
    for (Piece<T>& piece : pieces_) {
      piece.ties = std::min(piece.equal, ties);  // ties go to the lower linear index
      ties -= piece.ties;
      piece.first_out = out;
      out += piece.above + piece.ties;
    }
    return ties == 0;
  }

  // The place in a piece up to which ties are kept.
  int64_t end_of_ties(const Piece<T>& piece, const Source<T>& source) const {
    if (piece.ties == 0) return 0;
    if (piece.ties == piece.equal) return source.count;
    const Range<T> range = Range<T>::between(threshold_, threshold_);
    int64_t left = piece.ties, place = 0;
    for (; place < source.count; place += kBlock) {
      const int64_t equal = count_within(source.values + place, std::min(kBlock, source.count - place), range);
      if (equal >= left) break;
      left -= equal;
    }
    for (; left > 0; ++place) left -= range.holds(magnitude_bits(source.values[place]));
    return place;
  }

  const T* a_;
  int64_t n_, count_, nnz_;
  const ParallelFor& parallel_for_;
  std::vector<Piece<T>> pieces_;
  Key<T> threshold_ = 0;
  std::unique_ptr<Scratch<char>> scratch_;
  bool with_cols_ = false;  // the candidates are all that may be written, with their columns
};

}  // namespace

template <class T>
void topk_csr(const T* a, int64_t m, int64_t n, int64_t nnz, T* values, int32_t* row_ptr, int32_t* col_idx,
              const ParallelFor& parallel_for) {
  if (nnz == 0) {
    std::fill(row_ptr, row_ptr + m + 1, 0);
    return;
  }
  row_ptr[0] = 0;
  Selection<T> selection(a, m, n, nnz, parallel_for);
  selection.find();
  selection.write(values, row_ptr, col_idx);
}

template <class T>
void subtract_from(const T* w, int64_t count, T* product, const ParallelFor& parallel_for) {
  parallel_for(count, kParallel, [&](int64_t begin, int64_t end) {
    simd::run([&] SIMD_LAMBDA() {
      const T* from = w;
      T* out = product;
      for (int64_t i = begin; i < end; ++i) out[i] = from[i] - out[i];
    });
  });
}

#define CMD_EXT_INSTANTIATE(T)                                                                             \
  template void topk_csr(const T*, int64_t, int64_t, int64_t, T*, int32_t*, int32_t*, const ParallelFor&); \
  template void subtract_from(const T*, int64_t, T*, const ParallelFor&);
CMD_EXT_INSTANTIATE(float)
CMD_EXT_INSTANTIATE(double)

void transpose_csr(const int32_t* row_ptr, const int32_t* col_idx, int64_t m, int64_t n, int64_t groups,
                   int32_t* col_ptr, int32_t* row_idx, int32_t* perm) {
  std::fill(col_ptr, col_ptr + groups * n + 1, 0);
  const int64_t rows = m / groups;
  for (int64_t i = 0; i < m; ++i)
    for (int32_t k = row_ptr[i]; k < row_ptr[i + 1]; ++k) ++col_ptr[i / rows * n + col_idx[k] + 1];
  for (int64_t c = 0; c < groups * n; ++c) col_ptr[c + 1] += col_ptr[c];
  std::vector<int32_t> next(col_ptr, col_ptr + groups * n);
  for (int64_t i = 0; i < m; ++i)
    for (int32_t k = row_ptr[i]; k < row_ptr[i + 1]; ++k) {
      const int32_t place = next[i / rows * n + col_idx[k]]++;
      row_idx[place] = int32_t(i);
      perm[place] = k;
    }
}

}  // namespace cmd_ext::cpu
