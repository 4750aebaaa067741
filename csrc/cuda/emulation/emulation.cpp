#include "emulation.h"

extern "C" {

// The first fault since the last call; empty where there was none.
void embedgrad_emulation_error(char* message, int32_t size) {
    std::string& error = emulation::machine().error;
    std::strncpy(message, error.c_str(), size - 1);
    message[size - 1] = 0;
    error.clear();
}

// Sets the seed of the order in which threads run.
void embedgrad_emulation_seed(uint64_t seed) { emulation::machine().random = seed | 1; }
}
