// The part of GCC's OpenMP library that the core's loops call, by std::thread: ThreadSanitizer sees its forks, joins
// and barriers, as it does not those of libgomp. The functions and what they are to do are fixed by the compiler.
#include <array>
#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned size) : size(size), barrier(size) {}

  unsigned size;
  std::barrier<> barrier;
  std::array<std::atomic<long>, 16> taken{};  // iterations of each dynamic loop; relaxed, so that they hide no race
};

struct Member {
  Team* team = nullptr;
  unsigned number = 0;
  int loops = -1;  // begun
  long start = 0, end = 0, step = 0, chunk = 0;

  bool take(long* first, long* last) {
    *first = start + team->taken.at(loops).fetch_add(chunk, std::memory_order_relaxed) * step;
    *last = *first + chunk * step;
    if (step > 0 ? *last > end : *last < end) *last = end;
    return step > 0 ? *first < end : *first > end;
  }
};

thread_local Member self;

}  // namespace

extern "C" {

int omp_get_num_threads() { return self.team ? static_cast<int>(self.team->size) : 1; }

int omp_get_thread_num() { return static_cast<int>(self.number); }

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  if (threads == 0) threads = std::thread::hardware_concurrency();
  Team team(threads);
  const Member before = self;
  std::vector<std::thread> others;
  for (unsigned number = 1; number < threads; ++number)
    others.emplace_back([&team, run, data, number] {
      self = {&team, number};
      run(data);
    });
  self = {&team, 0};
  run(data);
  for (std::thread& other : others) other.join();
  self = before;
}

void GOMP_barrier() { self.team->barrier.arrive_and_wait(); }

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
  self.start = start, self.end = end, self.step = step, self.chunk = chunk;
  ++self.loops;
  return self.take(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return self.take(first, last); }

void GOMP_loop_end_nowait() {}

}  // extern "C"
