// Threads that work through many short loops in one call of a kernel.
#pragma once

#include <thread>

#include "native.h"

namespace deltajax {

// The caller and those of XLA's threads that come run one loop after the other; between loops they wait without sleeping, as
// waking a thread takes as long as a short loop. The caller takes tasks too and waits only for tasks that somebody has
// begun, so a pool that is busy cannot hang it.
class Team {
 public:
  // pool: as XLA's; most: threads, the caller's included.
  template <typename Pool>
  Team(Pool& pool, int64_t most)
      : size_(std::max<int64_t>(1, std::min(most, pool.num_threads()))), shared_(std::make_shared<Shared>()) {
    const std::thread::id caller = std::this_thread::get_id();
    try {
      for (int64_t i = 1; i < size_; ++i)
        pool.Schedule([shared = shared_, caller] {
          if (std::this_thread::get_id() == caller) return;  // the pool's queue was full: it would wait for itself
          for (int64_t waited = 0; !(shared->ticket.load(std::memory_order_acquire) & kStop);)
            waited = shared->work() ? 0 : rest(waited);
        });
    } catch (const std::bad_alloc&) {  // fewer come
    }
  }
  ~Team() { shared_->ticket.store(kStop, std::memory_order_release); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t size() const { return size_; }

  // f(0), ..., f(n - 1), all done when this returns; f throws nothing, n < 2^31 less the threads.
  template <typename F>
  void run(int64_t n, const F& f) {
    if (size_ == 1 || n < 2) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    shared_->call = [](const void* task, int64_t i) { (*static_cast<const F*>(task))(i); };
    shared_->task = &f;
    shared_->done.store(0, std::memory_order_relaxed);
    shared_->ticket.store(static_cast<uint64_t>(n) << kBits, std::memory_order_release);
    while (shared_->work()) {
    }
    for (int64_t waited = 0; shared_->done.load(std::memory_order_acquire) < n;) waited = rest(waited);
  }

 private:
  static constexpr int kBits = 31;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1, kStop = uint64_t{1} << 63;

  struct Shared {
    std::atomic<uint64_t> ticket{0};  // n and the next task of the loop that runs, in one number: who draws it knows both
    std::atomic<int64_t> done{0};
    void (*call)(const void*, int64_t) = nullptr;
    const void* task = nullptr;  // read only by who drew a task, and then the caller still waits

    bool work() {
      uint64_t drawn = ticket.load(std::memory_order_acquire);
      if ((drawn & kMask) >= (drawn >> kBits & kMask)) return false;
      drawn = ticket.fetch_add(1, std::memory_order_acq_rel);
      if ((drawn & kMask) >= (drawn >> kBits & kMask)) return false;
      call(task, static_cast<int64_t>(drawn & kMask));
      done.fetch_add(1, std::memory_order_acq_rel);
      return true;
    }
  };

  static int64_t rest(int64_t waited) {
#if defined(__x86_64__)
    if (waited < 2000) __builtin_ia32_pause();
    else
#endif
      std::this_thread::yield();
    return waited + 1;
  }

  int64_t size_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace deltajax
