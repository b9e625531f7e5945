#include "simt_metrics.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace simt::metrics {
namespace {

struct Site {
  int line;
  bool shared;
  int kind;
  size_t size;
  bool operator<(const Site& o) const {
    return std::tie(line, shared, kind, size) < std::tie(o.line, o.shared, o.kind, o.size);
  }
};
using Request = std::map<int, uintptr_t>;                         // the lanes' addresses
std::map<Site, std::map<std::pair<int, int>, Request>> requests;  // by warp and execution
std::map<std::pair<int, int>, int> executions;                    // by thread and line, separately for shared memory

int sectors(const Request& request, size_t size) {
  std::set<uintptr_t> touched;
  for (const auto& [lane, address] : request)
    for (uintptr_t sector = address / 32; sector <= (address + size - 1) / 32; ++sector) touched.insert(sector);
  return int(touched.size());
}
int ideal_sectors(const Request& request, size_t size) {
  std::set<uintptr_t> bytes;
  for (const auto& [lane, address] : request)
    for (size_t i = 0; i < size; ++i) bytes.insert(address + i);
  return int((bytes.size() + 31) / 32);
}

// Lanes of a warp that one wavefront can serve: 128 bytes' worth.
int lanes_at_once(size_t size) { return size <= 4 ? 32 : 128 / int(size); }

struct Wavefronts {
  int got = 0, ideal = 0;
};
// A bank gives one of its words a wavefront; any number of lanes may read that word.
Wavefronts wavefronts(const Request& request, size_t size) {
  std::map<int, std::set<uintptr_t>> words;  // of the lanes that go at once
  for (const auto& [lane, address] : request)
    for (size_t byte = 0; byte < std::max<size_t>(size, 4); byte += 4)
      words[lane / lanes_at_once(size)].insert((address + byte) / 4);
  Wavefronts out;
  for (const auto& [group, of_group] : words) {
    int banks[32] = {};
    for (uintptr_t word : of_group) ++banks[word % 32];
    out.got += *std::max_element(banks, banks + 32);
    ++out.ideal;
  }
  return out;
}

}  // namespace

void note(int thread, int site, uintptr_t address, size_t size, int kind, bool shared) {
  const int execution = executions[{thread, 2 * site + shared}]++;
  requests[{site, shared, kind, size}][{thread / 32, execution}][thread % 32] = address;
}

void print(const char* kernel) {
  for (const auto& [site, executed] : requests) {
    long got = 0, ideal = 0;
    for (const auto& [key, request] : executed) {
      const Wavefronts shared = wavefronts(request, site.size);
      got += site.shared ? shared.got : sectors(request, site.size);
      ideal += site.shared ? shared.ideal : ideal_sectors(request, site.size);
    }
    const char* kinds[] = {"load", "store", "atomic"};
    std::printf("ACCESS %s %d %s %s %zu %zu %ld %ld\n", kernel, site.line, site.shared ? "shared" : "global",
                kinds[site.kind], site.size, executed.size(), got, ideal);
  }
  requests.clear();
  executions.clear();
}

}  // namespace simt::metrics
