// Scratch memory that a thread keeps between calls: fresh memory costs a page fault every 4 KB, which for a call of a
// layer adds up to more than its arithmetic.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace cmd_ext::cpu {

enum class Slot { strip, input, plan, sums, count };  // what a call may hold at the same time

// `count` elements of T, aligned to pages; not initialised. A block of up to 64 MB returns to its slot of the thread
// that gives it up, where the next call finds it.
template <class T>
class Scratch {
 public:
  Scratch(Slot slot, int64_t count) : slot_(slot), block_(std::exchange(kept(slot), {})) {
    const int64_t bytes = count * int64_t(sizeof(T));
    if (bytes <= block_.bytes) return;
    std::free(block_.data);
    const int64_t pages = (bytes + kPage - 1) / kPage * kPage;
    block_ = {std::aligned_alloc(kPage, size_t(pages)), pages};
    if (!block_.data) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (block_.bytes <= kMost && block_.bytes > kept(slot_).bytes) std::swap(block_, kept(slot_));
    std::free(block_.data);
  }
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  static constexpr int64_t kPage = 4096, kMost = int64_t(64) << 20;
  struct Block {
    void* data;
    int64_t bytes;
  };
  struct Kept {
    Block blocks[int(Slot::count)] = {};
    ~Kept() {
      for (Block& block : blocks) std::free(block.data);
    }
  };
  static Block& kept(Slot slot) {
    static thread_local Kept kept;
    return kept.blocks[int(slot)];
  }

  Slot slot_;
  Block block_;
};

}  // namespace cmd_ext::cpu
