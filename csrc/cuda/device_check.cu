// Tells whether this library's kernels run on the current device. They do not where the driver is older than the linked
// CUDA runtime, or where the GPU is older than every target that the library was compiled for.
#include <cstring>

#include "api.h"
#include "runtime.cuh"

namespace embedgrad {
namespace {

__global__ void nothing_kernel() {}

}  // namespace
}  // namespace embedgrad

int32_t embedgrad_problem_cuda(char* message, int32_t size) {
    const char* problem = embedgrad::problem_of(embedgrad::nothing_kernel);
    if (size > 0) {
        std::strncpy(message, problem ? problem : "", size - 1);
        message[size - 1] = 0;
    }
    return problem != nullptr;
}
