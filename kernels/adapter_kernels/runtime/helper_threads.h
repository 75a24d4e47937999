// Threads of this library's own, for the loops of row_adamw.cpp (in meft) and host_topk.cpp. Not OpenMP's: those
// wait awake by default, and torch's number of them is one under torchrun.
//
// What the computation waits for (picks, the drain of gradients) goes before the update of rows, which goes on beside it:
// the update's threads leave it between two pieces, and come back when nobody else has anything to do.

#ifndef ADAPTER_KERNELS_HELPER_THREADS_H
#define ADAPTER_KERNELS_HELPER_THREADS_H

#include <algorithm>
#include <atomic>
#include <chrono>
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

// How many threads are at work that goes first. A fork takes none of them along: the count is of one process. It is
// shared between libraries: with a change of it, raise the versions of both.
class Urgent {
public:
    // From the constructor to the destructor.
    struct Scope {
        Urgent& urgent = *used();
        Scope() { urgent.begin(); }
        ~Scope() { urgent.end(); }
    };

    bool any() const {
        const uint64_t seen = state_.load(std::memory_order_relaxed);
        return static_cast<uint32_t>(seen) && of_this_process(seen);
    }

    // That of this library, or of another one, whose work then goes first too.
    static std::atomic<Urgent*>& used() {
        static Urgent own;
        static std::atomic<Urgent*> current{&own};
        return current;
    }

private:
    void begin() {
        for (uint64_t seen = state_.load(), next;; ) {
            next = of_this_process(seen) ? seen + 1 : here() | 1;
            if (state_.compare_exchange_weak(seen, next)) return;
        }
    }
    void end() { --state_; }
    static uint64_t here() { return static_cast<uint64_t>(static_cast<uint32_t>(getpid())) << 32; }
    static bool of_this_process(uint64_t state) { return state >> 32 == here() >> 32; }

    std::atomic<uint64_t> state_{0}; // the process in the upper half, the threads in the lower
};

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

    // As `run`, before what gives way; the threads that do so help, since they hold the helpers.
    void run_first(const std::function<void()>& work, int64_t wanted) {
        const Urgent::Scope scope;
        Offer offer{&work};
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            offer.next = first_, first_ = &offer;
        }
        run(work, wanted);
        std::unique_lock<std::mutex> lock(mutex_);
        take_back(&offer);
        done_.wait(lock, [&] { return offer.helping == 0; });
    }

    // Call between two pieces of work that gives way.
    void give_way() {
        while (Urgent::used().load()->any()) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                for (Offer* offer = first_; offer; offer = first_) {
                    ++offer->helping;
                    lock.unlock();
                    (*offer->work)();
                    lock.lock();
                    take_back(offer); // all of it is taken
                    if (--offer->helping == 0) done_.notify_all();
                }
            }
            std::this_thread::sleep_for(std::chrono::microseconds(20)); // others end their last pieces
        }
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
    struct Offer {
        const std::function<void()>* work;
        Offer* next = nullptr;
        int64_t helping = 0;
    };

    void take_back(Offer* offer) {
        for (Offer** at = &first_; *at; at = &(*at)->next)
            if (*at == offer) {
                *at = offer->next;
                return;
            }
    }

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
            if (--active_ == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    const std::function<void()>* work_ = nullptr;
    Offer* first_ = nullptr;
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
    Helpers::mine().run_first(take, std::min<int64_t>(threads, (count + share - 1) / share) - 1);
}

// The same, of work that gives way to all that is done by `in_pieces`.
template <class Work>
void in_pieces_later(int64_t count, int64_t share, int64_t threads, const Work& work) {
    Helpers& helpers = Helpers::mine();
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t from; helpers.give_way(), (from = next.fetch_add(share)) < count;)
            work(from, std::min(from + share, count));
    };
    helpers.give_way(); // else it might find the helpers taken, and would have none to its end
    helpers.run(take, std::min<int64_t>(threads, (count + share - 1) / share) - 1);
}

} // namespace

#endif
