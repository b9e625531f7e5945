// Kernels that test the emulator: each is right, and each has faults to plant.
#pragma once

#include "gpu.h"

namespace simt_test {

enum class Fault {
  kNone,
  kMissingBarrier,
  kDivergentBarrier,
  kEarlyReturn,
  kSharedIndex,    // inside the next row or array
  kSharedPointer,  // past the array
  kGlobalRead,     // past the buffer
  kMissingWait,
  kBarrierInsteadOfShuffle,
  kInactiveLane,
  kDifferentMasks,
  kMissingSyncwarp,
  kMissingRelease,
  kMissingAcquire,
  kUninitialised,
  kMisaligned,
  kOverwrittenCopy,
  kCopyInFlight,
};

// c [n, n] = a b of n x n matrices, by 16 x 16 tiles in static shared memory.
cudaError_t product(Fault fault, const float* a, const float* b, float* c, int n);

// c [64, 64] = a [64, k] b [64, k]^T by mma.sync (bf16), two stages of cp.async in dynamic shared memory, ldmatrix.
cudaError_t mma_product(Fault fault, const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k);

// out[block] = sum of the block's 256 values, by shuffles.
cudaError_t block_sums(Fault fault, const float* x, int blocks, float* out);

// *out = sum of x: the last block to finish adds the blocks' sums. `ticket` counts from zero.
cudaError_t last_block_sum(Fault fault, const float* x, int blocks, float* partial, unsigned* ticket, float* out);

// counts [16] of the low bits, through shared histograms; the last block copies them to `out` in reverse order.
cudaError_t histogram(Fault fault, const unsigned* x, int n, unsigned* counts, unsigned* ticket, unsigned* out);

// y[i] = x[n - 1 - i] in a warp, through shared memory and __syncwarp.
cudaError_t reverse_warp(Fault fault, const float* x, float* y);

// out[thread] of 64 threads = x[0], through a shared word that one thread of the second warp overwrites afterwards.
cudaError_t overwrite(Fault fault, const float* x, float* out);

// y = x, 16 bytes at a time.
cudaError_t copy_vectors(Fault fault, const float* x, float* y, int vectors);

// y[i] = x[32 blocks - 1 - i], moved by structs of 40 bytes (memcpy and whole-struct assignment) and by bytes.
struct Record {
  int64_t words[5];
};
cudaError_t move_records(Fault fault, const Record* x, Record* y, unsigned char* bytes);

// y = the first `count` of 256 floats of x, zeros after, through cp.async.
cudaError_t copy_async(Fault fault, const float* x, int count, float* y);

// Per lane, the results of every warp operation and integer atomic: out [kOperations, 32].
constexpr int kOperations = 18;
cudaError_t operations(const uint32_t* x, uint32_t* out);

// out[i] of 64 threads: count, all and any of x[i] over the block.
cudaError_t block_votes(const int* x, int* out);

// d [16, 8] += a [16, 16] b [8, 16]^T with a, b from ldmatrix, b also from a transposed matrix [16, 8]; then tf32 with
// a [16, 8] and b [8, 8].
cudaError_t fragments_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, bool transposed, float* d);
cudaError_t fragments_f16(const __half* a, const __half* b, bool transposed, float* d);
cudaError_t fragments_tf32(const float* a, const float* b, float* d);

// Every thread of the grid writes out[0].
cudaError_t write_same(int* out, int blocks, int threads);
extern const int write_same_line;

// order[thread of the grid] = how many threads came before.
cudaError_t arrival(unsigned* counter, unsigned* order, int blocks, int threads);

// values [blocks, 2]: what a block finds in a static and in a dynamic shared word, which it then writes.
cudaError_t leftovers(unsigned* values, int blocks);

// Nothing, with any configuration.
cudaError_t empty(dim3 grid, dim3 block, size_t shared);

// *out = a + b + c + d + record.words[4], of parameters of mixed alignment.
cudaError_t parameters(char a, double b, short c, float d, Record record, double* out);

}  // namespace simt_test
