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
using Request = std::vector<uintptr_t>;                           // the lanes' addresses
std::map<Site, std::map<std::pair<int, int>, Request>> requests;  // by warp and execution
std::map<std::pair<int, int>, int> executions;                    // by thread and line, separately for shared memory

int sectors(const Request& request, size_t size) {
  std::set<uintptr_t> touched;
  for (uintptr_t address : request)
    for (uintptr_t sector = address / 32; sector <= (address + size - 1) / 32; ++sector) touched.insert(sector);
  return int(touched.size());
}
int ideal_sectors(const Request& request, size_t size) {
  std::set<uintptr_t> bytes;
  for (uintptr_t address : request)
    for (size_t i = 0; i < size; ++i) bytes.insert(address + i);
  return int((bytes.size() + 31) / 32);
}

// Lanes of a request that one wavefront can serve: 128 bytes' worth.
size_t lanes_at_once(size_t size) { return size <= 4 ? 32 : 128 / size; }

// A bank gives one of its words a wavefront; any number of lanes may read that word.
int wavefronts(const Request& request, size_t size) {
  int total = 0;
  for (size_t first = 0; first < request.size(); first += lanes_at_once(size)) {
    std::set<uintptr_t> words;
    for (size_t i = first; i < std::min(request.size(), first + lanes_at_once(size)); ++i)
      for (size_t byte = 0; byte < std::max<size_t>(size, 4); byte += 4) words.insert((request[i] + byte) / 4);
    int banks[32] = {};
    for (uintptr_t word : words) ++banks[word % 32];
    total += *std::max_element(banks, banks + 32);
  }
  return total;
}
int ideal_wavefronts(const Request& request, size_t size) {
  return int((request.size() + lanes_at_once(size) - 1) / lanes_at_once(size));
}

}  // namespace

void note(int thread, int site, uintptr_t address, size_t size, int kind, bool shared) {
  const int execution = executions[{thread, 2 * site + shared}]++;
  requests[{site, shared, kind, size}][{thread / 32, execution}].push_back(address);
}

void print(const char* kernel) {
  for (const auto& [site, executed] : requests) {
    long got = 0, ideal = 0;
    for (const auto& [key, request] : executed) {
      got += site.shared ? wavefronts(request, site.size) : sectors(request, site.size);
      ideal += site.shared ? ideal_wavefronts(request, site.size) : ideal_sectors(request, site.size);
    }
    const char* kinds[] = {"load", "store", "atomic"};
    std::printf("ACCESS %s %d %s %s %zu %zu %ld %ld\n", kernel, site.line, site.shared ? "shared" : "global",
                kinds[site.kind], site.size, executed.size(), got, ideal);
  }
  requests.clear();
  executions.clear();
}

}  // namespace simt::metrics
