// parallel_for: a loop over [0, n) shared by a few threads: those of torch, or a pool of our own.
//
// torch's loops run on the team of an OpenMP runtime that comes with torch. Between two of them its workers spin for a
// moment on the cores that ours would need, and ours would sleep and have to be woken: at the sizes of training a
// second thread then gains nothing. So the team that is awake is asked, by the entry that compilers call for a parallel
// region (GOMP_parallel, which libgomp, libiomp5 and libomp all export). We link no OpenMP: a second runtime would be a
// second team.
//
// The pool serves where torch has no such runtime, and after a fork, whose child has none of the team's threads. Its
// workers sleep on a condition variable and never spin. The caller works too, and waits only for workers that did join
// in, so that a busy machine costs no wake-up time.
//
// After a fork the child finds no workers and starts its own on first use. Two loops at once (from two Python threads,
// or one inside the other): the second runs on its caller's thread alone.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace puat {

using RangeBody = std::function<void(int64_t begin, int64_t end)>;  // must not throw

class ThreadPool {
 public:
  // Never destroyed: its threads sleep until the process ends, and a static destructor would have to outlive them.
  static ThreadPool& instance() {
    static std::atomic<ThreadPool*> current{nullptr};
    ThreadPool* pool = current.load();
    while (pool == nullptr || pool->pid_ != getpid()) {
      auto* fresh = new ThreadPool();
      if (current.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  void run(int64_t n, int64_t chunk, int threads, const RangeBody& body) {
    if (busy_.test_and_set()) return body(0, n);
    start_workers(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      n_ = n;
      chunk_ = chunk;
      next_ = 0;
      invited_ = threads - 1;
      ++job_;
    }
    wake_.notify_all();
    work(body);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      body_ = nullptr;  // nobody joins from here on
      left_.wait(lock, [this] { return joined_ == 0; });
    }
    busy_.clear();
  }

 private:
  ThreadPool() : pid_(getpid()) {}

  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&ThreadPool::serve, this, workers_).detach();
    } catch (const std::system_error&) {
      // The system grants no more threads: the loop is shared by those that there are.
    }
  }

  void serve(int index) {
    uint64_t last_job = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return body_ != nullptr && job_ != last_job && index < invited_; });
      last_job = job_;
      const RangeBody& body = *body_;  // read under the lock: the caller takes body_ back while we still work
      ++joined_;
      lock.unlock();
      work(body);
      lock.lock();
      if (--joined_ == 0) left_.notify_one();
    }
  }

  void work(const RangeBody& body) {
    for (int64_t begin; (begin = next_.fetch_add(chunk_)) < n_;) body(begin, std::min(begin + chunk_, n_));
  }

  const pid_t pid_;
  int workers_ = 0;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  const RangeBody* body_ = nullptr;
  int64_t n_ = 0;
  int64_t chunk_ = 1;
  std::atomic<int64_t> next_{0};
  int invited_ = 0;
  int joined_ = 0;
  uint64_t job_ = 0;
};

// The process that loaded this module: a child that it forks has none of the team's threads.
inline const pid_t kLoadedBy = getpid();

// The team of torch's OpenMP runtime.
class TorchTeam {
 public:
  // Whether there is one that this process may use.
  static bool is_there() { return entry() != nullptr && getpid() == kLoadedBy; }

  static void run(int64_t n, int64_t chunk, int threads, const RangeBody& body) {
    Job job{body, n, chunk};
    entry()(&Job::work, &job, static_cast<unsigned>(threads), 0);
  }

 private:
  using Entry = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

  struct Job {
    const RangeBody& body;
    const int64_t n, chunk;
    std::atomic<int64_t> next{0};

    static void work(void* given) {
      Job& job = *static_cast<Job*>(given);
      for (int64_t begin; (begin = job.next.fetch_add(job.chunk)) < job.n;) {
        job.body(begin, std::min(begin + job.chunk, job.n));
      }
    }
  };

  static Entry entry() {
    static const Entry found = find();
    return found;
  }

  // Looked for among what is loaded, nothing is loaded for it. Other packages bring runtimes of their own along.
  static Entry find() {
    std::string path;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          const std::string name = info->dlpi_name;
          const std::string base = name.substr(name.rfind('/') + 1);
          const bool openmp =
              base.rfind("libgomp", 0) == 0 || base.rfind("libiomp5", 0) == 0 || base.rfind("libomp", 0) == 0;
          if (!openmp || name.find("/torch") == std::string::npos) return 0;
          *static_cast<std::string*>(result) = name;
          return 1;
        },
        &path);
    void* runtime = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return runtime == nullptr ? nullptr : reinterpret_cast<Entry>(dlsym(runtime, "GOMP_parallel"));
  }
};

// Calls body(begin, end) over disjoint ranges that cover [0, n), on up to `threads` threads. `grain`: the number of
// iterations worth handing to another thread; below twice that, all run on the caller's. `body` must not throw.
inline void parallel_for(int64_t n, int64_t grain, int threads, const RangeBody& body) {
  const int64_t parts = std::min<int64_t>(threads, n / grain);
  if (parts <= 1) {
    if (n > 0) body(0, n);
    return;
  }
  const int64_t chunk = std::max(grain, (n + 4 * parts - 1) / (4 * parts));  // four a thread even out a late start
  if (TorchTeam::is_there()) {
    TorchTeam::run(n, chunk, static_cast<int>(parts), body);
  } else {
    ThreadPool::instance().run(n, chunk, static_cast<int>(parts), body);
  }
}

}  // namespace puat
