// Coalescing and bank conflicts of translated kernels, counted for block 0 of each launch while config.metrics is set.
// The n-th execution of an instruction by each lane of a warp forms one request. Ideal is the fewest sectors of 32
// bytes that could hold the distinct bytes of a request to global memory, and one wavefront for every 128 bytes of
// lanes of a request to shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt::metrics {

void note(int thread, int site, uintptr_t address, size_t size, int kind, bool shared);
// Prints and forgets what has been noted, a line for each instruction:
// ACCESS kernel, PTX line, global or shared, load or store or atomic, bytes a lane, requests, sectors or wavefronts,
// ideal
void print(const char* kernel);

}  // namespace simt::metrics
