// Ends this process, with a message, if a call does not return in time.
//
// The call may hold the interpreter's lock for ever, so nothing here needs Python: a thread looks
// now and then whether the time is over.
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <unistd.h>

namespace {

using Clock = std::chrono::steady_clock;

std::mutex mutex;
bool is_watched = false;
Clock::time_point deadline;
char message[1024];
std::once_flag started;

void watch() {
    for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        std::lock_guard<std::mutex> lock(mutex);
        if (is_watched && Clock::now() > deadline) {
            ssize_t written = write(STDERR_FILENO, message, strlen(message));
            (void)written;
            _exit(1);
        }
    }
}

}  // namespace

extern "C" void parsimony_watch_begin(double seconds, const char* text) {
    std::call_once(started, [] { std::thread(watch).detach(); });
    std::lock_guard<std::mutex> lock(mutex);
    strncpy(message, text, sizeof(message) - 1);
    auto patience = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    deadline = Clock::now() + patience;
    is_watched = true;
}

extern "C" void parsimony_watch_end() {
    std::lock_guard<std::mutex> lock(mutex);
    is_watched = false;
}
