// Advances the sequences on the device, one thread per sequence; see common/advance.h.
#include "api.h"
#include "runtime.cuh"

namespace embedgrad {
namespace {

__global__ void advance_kernel(AdvanceBatch batch) {
    const int32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s < batch.sequences && advance_sequence(batch, s)) atomicAdd(batch.running, -1);
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_advance_cuda(const AdvanceBatch* batch, void* stream) {
    if (batch->sequences < 0 || batch->capacity < 1) return kBadSize;
    if (batch->sequences == 0) return kCallIsFine;
    const int threads = 128;
    EMBEDGRAD_LAUNCH(advance_kernel, (batch->sequences + threads - 1) / threads, threads, stream, *batch);
    return launched() ? kCallIsFine : kLaunchFailed;
}
