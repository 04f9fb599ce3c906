// Loops of a team on pools that are idle, busy, full or without memory; ends well if every task was done once.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

namespace {

enum class Kind { kIdle, kBusy, kFull, kNoMemory };

struct Pool {
  Kind kind;
  int64_t threads;
  std::vector<std::thread> running;
  std::deque<std::function<void()>> waiting;

  int64_t num_threads() const { return threads; }
  template <typename F>
  void Schedule(F&& f) {
    if (kind == Kind::kIdle) running.emplace_back(std::forward<F>(f));
    if (kind == Kind::kBusy) waiting.emplace_back(std::forward<F>(f));
    if (kind == Kind::kFull) f();  // as Eigen's, whose queues have an end
    if (kind == Kind::kNoMemory && !running.empty()) throw std::bad_alloc();
    if (kind == Kind::kNoMemory) running.emplace_back(std::forward<F>(f));
  }
};

void check(Kind kind, int64_t threads, int64_t most) {
  Pool pool{kind, threads, {}, {}};
  {
    deltajax::Team team(pool, most);
    if (team.size() != std::max<int64_t>(1, std::min(threads, most))) std::abort();
    for (int64_t n = 0; n < 300; ++n) {
      std::vector<int64_t> done(n, 0), twice(n, 0);  // plain: the second loop reads what the first wrote
      team.run(n, [&](int64_t i) { done[i] += i + 1; });
      team.run(n, [&](int64_t i) { twice[n - 1 - i] += 2 * done[n - 1 - i]; });
      for (int64_t i = 0; i < n; ++i)
        if (twice[i] != 2 * (i + 1)) std::abort();
    }
  }
  for (auto& late : pool.waiting) late();  // after the team's end
  for (std::thread& thread : pool.running) thread.join();
}

}  // namespace

int main() {
  for (Kind kind : {Kind::kIdle, Kind::kBusy, Kind::kFull, Kind::kNoMemory})
    for (int64_t threads : {0, 1, 2, 5}) check(kind, threads, 4);
  std::puts("done");
}
