// What CPU kernels share: vectors of the machine's width, sums across them, scratch memory, loops over XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace deltajax {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// The first n numbers, then zeros.
template <typename T>
inline Vector<T> load(const T* from, int64_t n) {
  if (n >= kLanes<T>) return load(from);
  Vector<T> x{};
  if (n > 0) std::memcpy(&x, from, n * sizeof(T));
  return x;
}

template <typename T>
inline void store(T* to, const Vector<T>& x) {
  std::memcpy(to, &x, sizeof(x));
}

// Only the first n numbers.
template <typename T>
inline void store(T* to, const Vector<T>& x, int64_t n) {
  if (n >= kLanes<T>) return store(to, x);
  if (n > 0) std::memcpy(to, &x, n * sizeof(T));
}

// The lanes of a and, counted on, of b that are named.
template <typename T, int... Lane>
inline Vector<T> shuffle(const Vector<T>& a, const Vector<T>& b) {
#if (defined(__clang__) || __GNUC__ >= 12) && !defined(DELTAJAX_OLD_GCC)
  return __builtin_shufflevector(a, b, Lane...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Mask{Lane...});
#endif
}

template <typename T, int Apart, int... Lane>
inline Vector<T> halve(const Vector<T>& a, const Vector<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = kLanes<T>;
  return shuffle<T, (Lane & Apart ? lanes + Lane : Lane)...>(a, b) +
         shuffle<T, (Lane & Apart ? lanes + Lane - Apart : Lane + Apart)...>(a, b);
}

// Lane i of the result is the sum over the lanes of rows[i], for as many rows as a vector has lanes. Overwrites rows.
template <typename T, int Rows = kLanes<T>>
inline Vector<T> sums(Vector<T>* rows) {
  if constexpr (Rows == 1) {
    return rows[0];
  } else {
    constexpr int half = Rows / 2;
    for (int i = 0; i < half; ++i)
      rows[i] = halve<T, half>(rows[i], rows[i + half], std::make_integer_sequence<int, kLanes<T>>());
    return sums<T, half>(rows);
  }
}

template <typename T>
inline T sum(const Vector<T>& x) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

// Memory of one thread that its next task uses again. Grows only; whoever asks again loses what was in it.
class Scratch {
 public:
  template <typename T>
  static T* of(int64_t count) {
    thread_local Scratch mine;
    const std::size_t bytes = count * sizeof(T);
    if (bytes > mine.bytes_) {
      mine.data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      mine.bytes_ = bytes;
    }
    return reinterpret_cast<T*>(mine.data_.get());
  }

 private:
  struct Delete {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Delete> data_;
  std::size_t bytes_ = 0;
};

// f(0), ..., f(n - 1) on the caller's thread and those of XLA's pool that come. The caller takes tasks too and waits only
// for tasks that somebody has begun, so a pool that is busy, or whose every thread stands here, cannot hang it.
// False: a task had no memory.
template <typename F>
[[nodiscard]] bool parallel_for(xla::ffi::ThreadPool& pool, int64_t n, const F& f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> complete{true};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  const F* task = &f;  // read only by who got a number below n, and then the caller still waits
  auto work = [shared, task, n] {
    for (int64_t i = shared->next++; i < n; i = shared->next++) {
      try {
        (*task)(i);
      } catch (const std::bad_alloc&) {
        shared->complete = false;
      }
      if (++shared->done == n) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done >= n; });
  return shared->complete;
}

}  // namespace deltajax

// How many bytes the vectors of this machine have: Python divides work by it.
extern "C" int deltajax_vector_bytes() { return deltajax::kVectorBytes; }
