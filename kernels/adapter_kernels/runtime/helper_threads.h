// Threads of this library's own, for the loops of row_adamw.cpp (in meft) and host_topk.cpp. Not OpenMP's: those
// wait awake by default, and torch's number of them is one under torchrun.

#ifndef ADAPTER_KERNELS_HELPER_THREADS_H
#define ADAPTER_KERNELS_HELPER_THREADS_H

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#define EXPORT extern "C" __declspec(dllexport)
#else
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Threads that sleep between calls. A new thread for each call would have to wait for a free core on a busy machine,
// where one that wakes is let in at once; and nobody waits for a helper that has not begun.
class Helpers {
public:
    // Run `work` on this thread and on up to `wanted` helpers; `work` must share itself out and end when all is done.
    void run(const std::function<void()>& work, int64_t wanted) {
        if (wanted < 1 || busy_.test_and_set()) return work(); // two callers at once: the second works alone
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            open_ = std::min(wanted, grow_to(wanted));
        }
        wake_.notify_all();
        work();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            open_ = 0;
            done_.wait(lock, [&] { return active_ == 0; });
        }
        busy_.clear();
    }

    // Those of this process: a fork has the parent's memory and none of its threads. Never destroyed, since the
    // threads use it to the end of the process.
    static Helpers& mine() {
        static std::atomic<Helpers*> current{nullptr};
        Helpers* found = current.load();
        if (!found || found->process_ != getpid()) {
            Helpers* fresh = new Helpers;
            if (current.compare_exchange_strong(found, fresh))
                found = fresh;
            else
                delete fresh;
        }
        return *found;
    }

private:
    int64_t grow_to(int64_t wanted) {
        try {
            for (; size_ < wanted; ++size_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // No further thread to be had: those there are do the work.
        }
        return size_;
    }

    // A thread starts with the cores of the one that makes it, which may be kept near a device; these go anywhere.
    static void use_all_cores() {
#if defined(__linux__)
        cpu_set_t cores;
        if (sched_getaffinity(getpid(), sizeof cores, &cores) == 0) sched_setaffinity(0, sizeof cores, &cores);
#endif
    }

    [[noreturn]] void serve() {
        use_all_cores();
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return open_ > 0; });
            --open_;
            ++active_;
            lock.unlock();
            (*work_)();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    const std::function<void()>* work_ = nullptr;
    int64_t open_ = 0, active_ = 0, size_ = 0; // may still join, are at work, exist
    const int process_ = getpid();
};

// Call `work(from, to)` for pieces of `share` of 0 to count - 1, on up to `threads` threads, this one among them.
template <class Work>
void in_pieces(int64_t count, int64_t share, int64_t threads, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t from; (from = next.fetch_add(share)) < count;) work(from, std::min(from + share, count));
    };
    Helpers::mine().run(take, std::min<int64_t>(threads, (count + share - 1) / share) - 1);
}

} // namespace

#endif
