/* The clock of programs that run on one thread: its processor time. */
#pragma once

#include <ctime>

namespace {

double processor_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

[[maybe_unused]] double seconds_of(auto body) {
    double start = processor_seconds();
    body();
    return processor_seconds() - start;
}

}  // namespace
