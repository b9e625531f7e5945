// Device memory, static and dynamic shared memory, asynchronous copies.
#include <cstdlib>
#include <map>

#include "simt_internal.h"

namespace simt {

// In the race build other allocations keep their distance, so that an access past the end meets none of them; for
// AddressSanitizer an allocation is exactly as large as asked.
#ifdef SIMT_RACE
constexpr size_t kMargin = 4096;
#else
constexpr size_t kMargin = 0;
#endif

void* dev_malloc(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes + 2 * kMargin) != 0) std::abort();
  p = static_cast<char*>(p) + kMargin;
  std::memset(p, 0xff, bytes);
  race::add_global(p, bytes);
  return p;
}

void dev_free(void* p) {
  if (!p) return;
  race::remove_global(p);
  std::free(static_cast<char*>(p) - kMargin);
}

void mark_init(void* p, size_t bytes) { race::mark_init(p, bytes); }

void access(const void* p, size_t bytes, int kind, Location line) {
  if (!current || !current->in_kernel) return;
  maybe_preempt();
  race::check(*current, p, bytes, kind, line);
}

void* dynamic_shared() { return block.shared; }

struct SharedVariables {
  uint32_t generation = 0;
  std::vector<Symbol> symbols;
};

namespace {

// The static arrays of the function that the scope is in: _ZZ<function>E<length>simt_scope_<n> gives their prefix.
SharedVariables* variables_of(const SharedScope* scope) {
  static std::map<std::string, SharedVariables> functions;
  const std::string name = symbol_at(reinterpret_cast<uintptr_t>(scope));
  const size_t at = name.rfind("simt_scope_");
  if (at == std::string::npos) {
    std::fprintf(stderr, "SIMT: static shared memory needs the symbol table of the file that holds the kernels\n");
    std::abort();
  }
  const std::string function = name.substr(0, name.rfind('E', at) + 1);
  const auto [it, added] = functions.try_emplace(function);
  if (added)
    for (Symbol symbol : writable_objects(function)) {
      symbol.name.erase(0, symbol.name.find_first_not_of("0123456789", function.size()));
      if (symbol.name.rfind("simt_scope_", 0) != 0) it->second.symbols.push_back(symbol);
    }
  return &it->second;
}

}  // namespace

void SharedScope::enter_block() {
  if (!variables) variables = variables_of(this);
  generation = block_generation;
  if (variables->generation == block_generation) return;
  variables->generation = block_generation;
  for (const Symbol& symbol : variables->symbols) {
    std::memset(reinterpret_cast<void*>(symbol.begin), 0xff, symbol.bytes);
    block.static_shared_bytes += symbol.bytes;
    race::enter_shared(symbol);
  }
}

// Asynchronous copies ------------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Location line) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & uintptr_t(bytes - 1)) {
    if (first_report("misaligned", site_of(line)))
      report("misaligned", "cp.async of %d bytes from %p to %p at %s", bytes, global, shared, describe(line).c_str());
    return;
  }
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, source_bytes,
                  line};
  unsigned char source[16];
  std::memcpy(source, global, size_t(source_bytes));  // so that AddressSanitizer sees a bad address here
  race::begin_copy(*current, copy);
  std::memset(shared, 0xff, size_t(bytes));
  current->copies.push_back(copy);
}

void cp_async_commit() {
  Thread& thread = *current;
  thread.groups.push_back(thread.copies.size() - thread.committed);
  thread.committed = thread.copies.size();
}

void cp_async_wait(int pending_groups) {
  Thread& thread = *current;
  for (; int(thread.groups.size()) > pending_groups; thread.groups.pop_front()) {
    for (size_t i = thread.groups.front(); i > 0; --i, --thread.committed, thread.copies.pop_front()) {
      const Copy& copy = thread.copies.front();
      race::end_copy(thread, copy);
      std::memcpy(copy.shared, copy.global, size_t(copy.source_bytes));
      std::memset(copy.shared + copy.source_bytes, 0, size_t(copy.bytes - copy.source_bytes));
    }
  }
}

}  // namespace simt
