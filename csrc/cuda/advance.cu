// Appends the sampled tokens on the device, one thread per row; what happens to a row is in common/advance.h.
#include "api.h"
#include "device.cuh"

namespace embedgrad {
namespace {

__global__ void advance_kernel(AdvanceBatch batch) {
    const int32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < batch.rows && advance_row(batch, row)) atomicAdd(batch.running, -1);
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_advance_cuda(const AdvanceBatch* batch, void* stream) {
    if (batch->rows < 0 || batch->max_new_tokens < 1 || batch->max_new_tokens > batch->capacity) return kBadSize;
    if (batch->rows == 0) return kCallIsFine;
    const int threads = 128;
    EMBEDGRAD_LAUNCH(advance_kernel, (batch->rows + threads - 1) / threads, threads, stream, *batch);
    return launched() ? kCallIsFine : kLaunchFailed;
}
