#include "engine.h"

#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace host_cuda {
namespace {

// Where a fiber or its scheduler goes on. By the compiler's own jumps: swapcontext would make a
// system call at every switch and, under AddressSanitizer, clear the books on the whole stack.
struct Place {
  void* registers[5];
  ucontext_t start;  // where it has never run yet
  bool started = true;
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t stack_size;
#elif defined(__SANITIZE_THREAD__)
  void* thread;
#endif
};

constexpr std::size_t kStack = 256 * 1024;

// Its context is made once; it then runs the body of one block after the other.
struct Fiber : Place {
  std::unique_ptr<char[]> memory{new char[kStack]};
  int index;
  bool finished;
};

Place scheduler;
Fiber* current = nullptr;
const std::function<void(int)>* running = nullptr;
int awake;  // threads that neither wait nor have finished
char launch_begun, launch_ended;

// What came before `before(&x)` comes before what follows a later `after(&x)`, in whatever threads.
void before([[maybe_unused]] char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}
void after([[maybe_unused]] char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

HOST_CUDA_UNSEEN void jump(Place& from, Place& to) {
  if (__builtin_setjmp(from.registers) != 0) return;
  if (to.started) __builtin_longjmp(to.registers, 1);
  to.started = true;
  setcontext(&to.start);
}

HOST_CUDA_UNSEEN void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* own;
  __sanitizer_start_switch_fiber(&own, to.stack, to.stack_size);
  jump(from, to);
  __sanitizer_finish_switch_fiber(own, &to.stack, &to.stack_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
  jump(from, to);
#else
  jump(from, to);
#endif
}

HOST_CUDA_UNSEEN void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
  for (;;) {
    after(&launch_begun);
    (*running)(current->index);
    before(&launch_ended);
    current->finished = true;
    go(*current, scheduler);
  }
}

std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->started = false;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->memory.get();
  fiber->start.uc_stack.ss_size = kStack;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, start, 0);
#if defined(__SANITIZE_ADDRESS__)
  fiber->stack = fiber->memory.get();
  fiber->stack_size = kStack;
#elif defined(__SANITIZE_THREAD__)
  fiber->thread = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Switches once to every fiber that has not finished; says whether there was one.
HOST_CUDA_UNSEEN bool run_each(Fiber* const* fibers, int threads, bool reversed) {
  bool any = false;
  for (int t = 0; t < threads; ++t) {
    current = fibers[reversed ? threads - 1 - t : t];
    if (current->finished) continue;
    any = true;
    go(scheduler, *current);
  }
  return any;
}

}  // namespace

void fail(const char* what, const char* file, int line) {
  std::fprintf(stderr, "host_cuda: %s %s:%d\n", what, file, line);
  std::_Exit(70);
}

void run_together(int threads, bool reversed, const std::function<void(int)>& body) {
  static std::vector<std::unique_ptr<Fiber>> pool;  // their stacks are used again and again
  while (static_cast<int>(pool.size()) < threads) pool.push_back(make_fiber());
  std::vector<Fiber*> fibers;
  for (int t = 0; t < threads; ++t) {
    fibers.push_back(pool[t].get());
    fibers[t]->index = t;
    fibers[t]->finished = false;
  }
#if defined(__SANITIZE_THREAD__)
  scheduler.thread = __tsan_get_current_fiber();
#endif
  running = &body;
  awake = threads;
  before(&launch_begun);
  while (run_each(fibers.data(), threads, reversed)) {
  }
  after(&launch_ended);
}

HOST_CUDA_UNSEEN void Barrier::wait(const char* file, int line) {
  if (gone_ > 0) fail("divergent barrier: a thread has left the kernel before", file, line);
  if (came_ == 0) {
    file_ = file;
    line_ = line;
  } else if (line != line_ || std::strcmp(file, file_) != 0) {
    fail("divergent barrier: threads wait at different places, one of them", file, line);
  }
  const unsigned turn = turn_;
  // Of two, as whoever leaves a turn may come to the next one before others have left it.
  before(&order_[turn % 2]);
  if (++came_ == threads_) {
    awake += threads_ - 1;
    came_ = 0;
    ++turn_;
  } else {
    if (--awake == 0) fail("deadlock: every thread waits, the last one", file, line);
    while (turn_ == turn) go(*current, scheduler);
  }
  after(&order_[turn % 2]);
}

HOST_CUDA_UNSEEN void Barrier::leave() {
  if (came_ > 0)
    fail("divergent barrier: a thread leaves the kernel while others wait", file_, line_);
  ++gone_;
  if (--awake == 0 && gone_ < threads_) fail("deadlock: every thread that is left waits");
}

}  // namespace host_cuda
