// AdamW and Adam on scattered rows of a table, over a plain C interface: no Python or torch header, so that one build
// serves all their versions. Loaded by row_update.py.
//
// Each operation rounds by itself (built with -ffp-contract=off), in the order of adapter_kernels/adamw_blocks.py, the
// torch path: both give the same bits, whatever instructions the machine has.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#define EXPORT extern "C" __declspec(dllexport)
#else
#include <unistd.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// One build for every x86-64: the loader picks the widest clone that the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EACH_VECTOR_WIDTH __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef FOR_EACH_VECTOR_WIDTH
#define FOR_EACH_VECTOR_WIDTH
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#elif defined(_MSC_VER)
#define INLINE __forceinline
#define RESTRICT __restrict
#else
#define INLINE inline
#define RESTRICT
#endif

namespace {

// The scalars of one step, in the order of _COLUMNS in row_update.py.
struct Step {
    float mix;       // of (g - m): 1 - beta1 added to m, or -beta1 added to g
    float from_grad; // which of the two; the first while 1 - beta1 < 0.5, as torch.lerp
    float beta2;
    float fresh2;    // 1 - beta2
    float eps;
    float decay;     // decoupled: 1 - lr * weight_decay, else 1
    float coupled;   // coupled: weight_decay, else 0
    float step_size; // lr / (1 - beta1^n)
    float root2;     // sqrt(1 - beta2^n)
};
static_assert(sizeof(Step) == 9 * sizeof(float), "Step is handed over as nine floats");

template <bool COUPLED, bool FROM_GRAD>
INLINE void step_as(float* RESTRICT p, float* RESTRICT m, float* RESTRICT v, const float* RESTRICT grad,
                    int64_t width, const Step& s) {
    const float mix = s.mix, beta2 = s.beta2, fresh2 = s.fresh2, eps = s.eps, decay = s.decay;
    const float coupled = s.coupled, step_size = s.step_size, root2 = s.root2;
    for (int64_t i = 0; i < width; ++i) {
        float g = grad[i];
        if (COUPLED) g = g + coupled * p[i];
        const float moved = mix * (g - m[i]);
        const float m_new = (FROM_GRAD ? g : m[i]) + moved;
        const float v_new = v[i] * beta2 + (fresh2 * g) * g;
        m[i] = m_new;
        v[i] = v_new;
        p[i] = p[i] * decay - (m_new * step_size) / (std::sqrt(v_new) / root2 + eps);
    }
}

template <bool COUPLED>
INLINE void step_from(float* p, float* m, float* v, const float* grad, int64_t width, const Step& s) {
    if (s.from_grad != 0.0f)
        step_as<COUPLED, true>(p, m, v, grad, width, s);
    else
        step_as<COUPLED, false>(p, m, v, grad, width, s);
}

FOR_EACH_VECTOR_WIDTH
void step_block(float* p, float* m, float* v, const float* grad, int64_t width, const Step& s) {
    if (s.coupled != 0.0f)
        step_from<true>(p, m, v, grad, width, s);
    else
        step_from<false>(p, m, v, grad, width, s);
}

// float32 to bfloat16, to the nearest, ties to even; NaN stays NaN.
FOR_EACH_VECTOR_WIDTH
void round_block(uint16_t* RESTRICT wire, const float* RESTRICT p, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + i, sizeof bits);
        const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        wire[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
    }
}

struct Job {
    float *table, *exp_avg, *exp_avg_sq;
    uint16_t* wire;
    const float* grads;
    const int64_t* rows;
    const Step* steps;
    int64_t count, width;

    // The processor's own prefetch ends with the row and with each page: touch those of the next row. More costs time.
    void look_ahead(int64_t next) const {
#if defined(__GNUC__)
        constexpr int64_t PAGE = 4096 / sizeof(float);
        for (int64_t i = 0; i < width; i += PAGE)
            for (const float* values : {table, exp_avg, exp_avg_sq}) __builtin_prefetch(values + next + i);
#endif
    }

    void row(int64_t i) const {
        const int64_t at = rows[i] * width;
        if (i + 1 < count) look_ahead(rows[i + 1] * width);
        step_block(table + at, exp_avg + at, exp_avg_sq + at, grads + i * width, width, steps[i]);
        if (wire) round_block(wire + at, table + at, width);
    }
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

    [[noreturn]] void serve() {
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

} // namespace

// Changes with the arguments below or with Step, so that a stale build is not called.
EXPORT int meft_row_adamw_version() { return 3; }

// Whether rows ascend, each once, from 0 to limit - 1.
EXPORT int meft_rows_ascend(const int64_t* rows, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = rows[i++])
        if (rows[i] <= before || rows[i] >= limit) return 0;
    return 1;
}

// Row rows[i] takes steps[i] with grads[i]. Rows must be distinct and in range. `wire` (bfloat16) may be null.
EXPORT void meft_row_adamw(float* table, float* exp_avg, float* exp_avg_sq, uint16_t* wire, const float* grads,
                           const int64_t* rows, int64_t count, int64_t width, const float* steps, int threads) {
    static_assert(alignof(Step) == alignof(float), "steps are read in place");
    const Job job{table, exp_avg, exp_avg_sq, wire, grads, rows, reinterpret_cast<const Step*>(steps), count, width};

    const int64_t share = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, width)); // rows taken at a time
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t from; (from = next.fetch_add(share)) < count;)
            for (int64_t i = from; i < std::min(from + share, count); ++i) job.row(i);
    };
    Helpers::mine().run(work, std::min<int64_t>(threads, (count + share - 1) / share) - 1);
}
