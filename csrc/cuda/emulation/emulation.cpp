#include "emulation.h"

extern "C" {

// What went wrong since the last call; empty: nothing.
void embedgrad_emulation_error(char* message, int32_t size) {
    std::string& error = emulation::machine().error;
    std::strncpy(message, error.c_str(), size - 1);
    message[size - 1] = 0;
    error.clear();
}

// Another order of the threads.
void embedgrad_emulation_seed(uint64_t seed) { emulation::machine().random = seed | 1; }
}
