// Runs the CUDA threads of one block on the host and lets them wait for each other.
//
// Each is a fiber: one thread of the host runs them in turns, each up to its next barrier, which is
// fast and always the same. What a thread wrote and another reads without a barrier between is then
// wrong in one of the two orders, and both are run. The sanitizers are told of the fibers: to
// ThreadSanitizer they are threads that only barriers put in order, whatever the turns.
#pragma once

#include <functional>

// A function that switches fibers or keeps the books on them, which are no business of the
// sanitizers'.
#define HOST_CUDA_UNSEEN __attribute__((noinline, no_sanitize("address", "thread")))

namespace host_cuda {

// Runs body(0), body(1), ... so that they may wait for each other; `reversed` starts with the last.
// The last thing that every one of them calls is its block's barrier's `leave`.
void run_together(int threads, bool reversed, const std::function<void(int)>& body);

[[noreturn]] void fail(const char* what, const char* file = "", int line = 0);

// Waits until all have come, and from the same line of code.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;

  void wait(const char* file, int line);
  void leave();  // the thread has finished the kernel; nobody may wait from now on

 private:
  int threads_, came_ = 0, gone_ = 0;
  unsigned turn_ = 0;
  const char* file_ = "";
  int line_ = 0;
  char order_[2];  // what comes before and after odd and even turns, for ThreadSanitizer
};

}  // namespace host_cuda
