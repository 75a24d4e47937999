// Two calls that go first while an update is under way; prints how many threads did the second, and whether the first
// returned before the second was done.

#include <cstdio>
#include <set>

#include "../../kernels/adapter_kernels/runtime/helper_threads.h"

int main() {
    std::atomic<bool> first_ended{false}, second_ended{false};
    bool in_time = false;
    std::mutex lock;
    std::set<std::thread::id> of_second;
    const auto rest = [](int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
    const auto wait = [](int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); };
    std::thread update([&] {
        in_pieces_later(1 << 20, 1, 3, [&](int64_t from, int64_t to) {
            if (!(first_ended && second_ended)) rest(from, to);
        });
    });
    wait(20);
    std::thread first([&] {
        in_pieces(40, 1, 3, rest);
        in_time = !second_ended;
        first_ended = true;
    });
    wait(5);
    std::thread second([&] {
        in_pieces(400, 1, 3, [&](int64_t from, int64_t to) {
            {
                const std::lock_guard<std::mutex> guard(lock);
                of_second.insert(std::this_thread::get_id());
            }
            rest(from, to);
        });
        second_ended = true;
    });
    first.join();
    second.join();
    update.join();
    std::printf("%zu %d\n", of_second.size(), in_time);
}
