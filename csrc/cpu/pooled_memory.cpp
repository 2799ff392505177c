#include "pooled_memory.h"

#include <cstddef>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace snf {
namespace {

constexpr std::size_t kSmallest = std::size_t{1} << 20;
constexpr std::size_t kMostKept = std::size_t{256} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct Block {
  void* data;
  std::size_t size;
};

class Pool {
 public:
  Block take(std::size_t bytes) {
    const std::size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (block->size >= size && block->size <= size + size / 4) {
          const Block found = *block;
          kept_ -= found.size;
          free_.erase(block);
          return found;
        }
    }
    const Block fresh = {::operator new(size, std::align_val_t{kHugePage}), size};
#if defined(__linux__)
    madvise(fresh.data, fresh.size, MADV_HUGEPAGE);  // a hint: whether it is taken does not matter
#endif
    return fresh;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_front(block);
    kept_ += block.size;
    while (kept_ > kMostKept) {
      kept_ -= free_.back().size;
      ::operator delete(free_.back().data, std::align_val_t{kHugePage});
      free_.pop_back();
    }
  }

 private:
  std::mutex mutex_;
  std::list<Block> free_;  // the latest given first
  std::size_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto bytes =
      static_cast<std::size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < kSmallest) return at::empty(sizes, options);
  const Block block = pool().take(bytes);
  return at::from_blob(block.data, sizes, [block](void*) { pool().give(block); }, options);
}

}  // namespace snf
