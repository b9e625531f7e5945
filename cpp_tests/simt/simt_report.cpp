// Reports, and the names in them: from the symbol table of the executable or library that holds the kernels, and by
// addr2line.
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "simt_internal.h"

namespace simt {

long n_errors = 0;

namespace {

struct Reports {
  std::string last;
  std::map<std::string, long> counts;
  std::set<std::tuple<std::string, uint32_t, uint32_t>> places;
};

Reports& reports() {
  static Reports all;
  return all;
}

std::string context() {
  if (!block.launch) return "";
  std::string out = " [" + demangle(kernel_name(*block.launch)) + ", block " + coordinates(block.linear, gridDim);
  if (current) out += ", thread " + coordinates(uint64_t(current->linear), blockDim);
  return out + "]";
}

}  // namespace

void report(const char* kind, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  Reports& all = reports();
  ++n_errors;
  all.last = std::string(kind) + ": " + message + context();
  if (all.counts[kind]++ < config.max_errors) std::fprintf(stderr, "SIMT %s\n", all.last.c_str());
}

bool first_report(const char* kind, uint32_t site, uint32_t other) {
  if (reports().places.emplace(kind, site, other).second) return true;
  ++n_errors;
  return false;
}

long n_reported(const char* kind) {
  const auto it = reports().counts.find(kind);
  return it == reports().counts.end() ? 0 : it->second;
}

const char* last_error() { return reports().last.c_str(); }

void reset_errors() {
  n_errors = 0;
  reports() = Reports();
}

namespace {

constexpr uint32_t kInterned = 1u << 31, kPtxLine = 1u << 30;

std::vector<Location>& interned() {
  static std::vector<Location> locations;
  return locations;
}

}  // namespace

uint32_t site_of(Location line) {
  if (!line.file) return kInterned | kPtxLine | uint32_t(line.line);
  static std::map<std::pair<const char*, int>, uint32_t> sites;
  const auto [it, added] = sites.emplace(std::make_pair(line.file, line.line), kInterned | uint32_t(interned().size()));
  if (added) interned().push_back(line);
  return it->second;
}

uint32_t site_of(const void* return_address) {
  return uint32_t(reinterpret_cast<uintptr_t>(return_address) - image_base());
}

std::string describe(uint32_t site) {
  if (!(site & kInterned)) return source_line(image_base() + site);
  const uint32_t rest = site & (kPtxLine - 1);
  return describe(site & kPtxLine ? Location(int(rest)) : interned()[rest]);
}

std::string describe(Location line) {
  if (!line.file) return "PTX line " + std::to_string(line.line);
  const char* slash = std::strrchr(line.file, '/');
  return std::string(slash ? slash + 1 : line.file) + ":" + std::to_string(line.line);
}

const char* verb(int kind) { return kind == kRead ? "read" : kind == kWrite ? "write" : "atomic"; }

std::string coordinates(uint64_t linear, uint3 extent) {
  const uint64_t x = linear % extent.x, y = linear / extent.x % extent.y, z = linear / extent.x / extent.y;
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

// Symbols ------------------------------------------------------------------------------------------------------------

namespace {

// The executable or library that the emulator, and so the kernels, are linked into.
struct Object {
  uintptr_t base = 0;
  std::string path;
};

const Object& own_object() {
  static const Object object = [] {
    Object found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const uintptr_t here = reinterpret_cast<uintptr_t>(&image_base) - info->dlpi_addr;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD || here - segment.p_vaddr >= segment.p_memsz) continue;
            *static_cast<Object*>(out) = {info->dlpi_addr, info->dlpi_name};
            return 1;
          }
          return 0;
        },
        &found);
    if (found.path.empty()) {  // the executable itself
      char path[4096];
      const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
      if (length > 0) found.path.assign(path, size_t(length));
    }
    return found;
  }();
  return object;
}

struct SymbolTable {
  std::map<uintptr_t, std::string> names;  // of functions and objects
  std::vector<Symbol> objects;             // writable, by name
};

// Empty if the file is stripped.
SymbolTable read_symbols() {
  SymbolTable table;
  const int file = open(own_object().path.c_str(), O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return table;
  void* mapped = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) return table;
  const char* image = static_cast<const char*>(mapped);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = image + sections[sections[s].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; ++i) {
      const auto& symbol = symbols[i];
      const int type = ELF64_ST_TYPE(symbol.st_info);
      if ((type != STT_FUNC && type != STT_OBJECT) || symbol.st_shndx == SHN_UNDEF ||
          symbol.st_shndx >= header->e_shnum)
        continue;
      const uintptr_t begin = image_base() + symbol.st_value;
      table.names.emplace(begin, names + symbol.st_name);
      if (type == STT_OBJECT && sections[symbol.st_shndx].sh_flags & SHF_WRITE)
        table.objects.push_back({names + symbol.st_name, begin, symbol.st_size});
    }
  }
  munmap(mapped, size_t(status.st_size));
  std::sort(table.objects.begin(), table.objects.end(),
            [](const Symbol& a, const Symbol& b) { return a.name < b.name; });
  return table;
}

const SymbolTable& symbol_table() {
  static const SymbolTable table = read_symbols();
  return table;
}

}  // namespace

uintptr_t image_base() { return own_object().base; }

std::string symbol_at(uintptr_t address) {
  const auto it = symbol_table().names.find(address);
  return it == symbol_table().names.end() ? "" : it->second;
}

std::vector<Symbol> writable_objects(const std::string& prefix) {
  std::vector<Symbol> found;
  const auto& objects = symbol_table().objects;
  auto it = std::lower_bound(objects.begin(), objects.end(), prefix,
                             [](const Symbol& symbol, const std::string& name) { return symbol.name < name; });
  for (; it != objects.end() && it->name.compare(0, prefix.size(), prefix) == 0; ++it) found.push_back(*it);
  return found;
}

std::string demangle(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (status != 0) return name;
  std::string out = text;
  std::free(text);
  int depth = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    depth += (out[i] == '<') - (out[i] == '>');
    if (depth == 0 && out[i] == '(' && out.compare(i, 11, "(anonymous ") != 0) return out.erase(i);
  }
  return out;
}

std::string source_line(uintptr_t pc) {
  static std::map<uintptr_t, std::string> known;
  std::string& line = known[pc];
  if (!line.empty()) return line;
  char address[32], output[1024] = "";
  std::snprintf(address, sizeof address, "%#zx", size_t(pc - image_base() - 1));
  const std::string command = "addr2line -e '" + own_object().path + "' " + address + " 2>/dev/null";
  if (FILE* pipe = popen(command.c_str(), "r")) {
    if (!std::fgets(output, sizeof output, pipe)) output[0] = 0;
    pclose(pipe);
  }
  output[std::strcspn(output, " \n")] = 0;
  const char* slash = std::strrchr(output, '/');
  line = slash ? slash + 1 : output;
  if (line.empty() || line[0] == '?') {
    std::snprintf(output, sizeof output, "pc %#zx", size_t(pc - image_base()));
    line = output;
  }
  return line;
}

}  // namespace simt
