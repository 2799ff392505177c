#include "pooled_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <cstddef>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace snf {
namespace {

constexpr std::size_t kSmallest = std::size_t{256} << 10;
constexpr std::size_t kMostKept = std::size_t{256} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Large blocks are whole huge pages: a large gradient then costs a dozen page faults.
std::size_t granularity(std::size_t bytes) {
  return bytes >= 4 * kHugePage ? kHugePage : std::size_t{64} << 10;
}

struct Block {
  void* data;
  std::size_t size;
};

Block allocate(std::size_t size) {
  const auto alignment = static_cast<std::align_val_t>(granularity(size));
  const Block block = {::operator new(size, alignment), size};
#if defined(__linux__)
  // A hint: whether it is taken does not matter.
  if (granularity(size) == kHugePage) madvise(block.data, block.size, MADV_HUGEPAGE);
#endif
  return block;
}

void release(Block block) {
  ::operator delete(block.data, static_cast<std::align_val_t>(granularity(block.size)));
}

class Pool {
 public:
  Block take(std::size_t bytes) {
    const std::size_t step = granularity(bytes), size = (bytes + step - 1) / step * step;
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
    try {
      return allocate(size);
    } catch (const std::bad_alloc&) {  // what is kept may be what is missing
      clear();
      return allocate(size);
    }
  }

  // Throws nothing: it runs where tensors are destroyed.
  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      free_.push_front(block);
    } catch (const std::bad_alloc&) {
      release(block);
      return;
    }
    kept_ += block.size;
    while (kept_ > kMostKept) {
      kept_ -= free_.back().size;
      release(free_.back());
      free_.pop_back();
    }
  }

 private:
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : free_) release(block);
    free_.clear();
    kept_ = 0;
  }

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
