#include "api.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#endif

#include "repack.h"

namespace {

using namespace embedgrad;

constexpr int64_t kPiece = 256;  // tokens computed together: enough for fast products, few enough to stay in the cache

// Calls work(team) on `threads` threads. They come from the OpenMP pool if there is one, which is also torch's, so that
// there are not twice as many threads as cores.
template <class Work>
void run_on_team(int32_t threads, const Work& work) {
#if defined(_OPENMP)
    std::optional<Barrier> barrier;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        barrier.emplace(omp_get_num_threads());
        work(Team{omp_get_thread_num(), omp_get_num_threads(), &*barrier});
    }
#else
    Barrier barrier(threads);
    std::vector<std::thread> others;
    for (int32_t rank = 1; rank < threads; ++rank)
        others.emplace_back([&, rank] { work(Team{rank, threads, &barrier}); });
    work(Team{0, threads, &barrier});
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace

void* embedgrad_decoder_create(const DecoderSpec* spec) { return new Decoder(*spec); }

void embedgrad_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

int32_t embedgrad_generate(void* decoder, Loop* loop, int32_t threads) {
    const SamplingError wrong = check_call(loop->sampling);
    if (wrong != kCallIsFine) return -1 - wrong;
    auto& model = *static_cast<Decoder*>(decoder);
    model.reserve(loop->advance.sequences);
    LoopEnd end = kGoOn;
    run_on_team(threads, [&](const Team& team) { run_loop(team, model, *loop, &end); });
    return end;
}

void embedgrad_decoder_advance(
    void* decoder, const Cache* cache, const Tokens* tokens, const Wanted* wanted, int32_t threads) {
    auto& model = *static_cast<Decoder*>(decoder);
    model.reserve(std::min(tokens->count, kPiece));
    std::vector<int32_t> chosen, target;
    for (int64_t from = 0; from < tokens->count; from += kPiece) {
        const int64_t count = std::min(kPiece, tokens->count - from);
        chosen.clear(), target.clear();
        for (int64_t i = 0; i < wanted->count; ++i)
            if (const int64_t token = wanted->tokens[i] - from; 0 <= token && token < count) {
                chosen.push_back(static_cast<int32_t>(token));
                target.push_back(wanted->target[i]);
            }
        const Tokens piece = {
            count, tokens->slots + from, tokens->positions + from, tokens->ids ? tokens->ids + from : nullptr,
            tokens->embeddings ? tokens->embeddings + from * model.spec().hidden : nullptr};
        const Wanted found = {static_cast<int64_t>(chosen.size()), chosen.data(), target.data(), wanted->logits};
        run_on_team(threads, [&](const Team& team) { model.advance(team, *cache, piece, found); });
    }
}

void embedgrad_linear(const Matrix* matrix, const float* x, int64_t batch, float* y, int32_t threads) {
    Activations activations(batch, matrix->columns);
    std::memcpy(activations.row(0), x, sizeof(float) * batch * matrix->columns);
    if (takes_quantised(*matrix))
        for (int64_t b = 0; b < batch; ++b) activations.quantise(b);
    run_on_team(threads, [&](const Team& team) {
        const auto [begin, end] = team.share(matrix->rows, kTileRows);
        linear(*matrix, activations, batch, nullptr, y, matrix->rows, false, begin, end);
    });
}

void embedgrad_widen(const Matrix* matrix, int64_t begin, int64_t end, float* out, int32_t threads) {
    run_on_team(threads, [&](const Team& team) {
        const auto share = team.share(end - begin, kTileRows);
        read_rows(*matrix, begin + share.begin, begin + share.end, out + share.begin * matrix->columns);
    });
}

void embedgrad_gather(const Matrix* matrix, const int64_t* rows, int64_t count, float* out, int32_t threads) {
    run_on_team(threads, [&](const Team& team) {
        const auto share = team.share(count);
        for (int64_t i = share.begin; i < share.end; ++i)
            read_rows(*matrix, rows[i], rows[i] + 1, out + i * matrix->columns);
    });
}

int64_t embedgrad_tile_bytes(int32_t stored, int64_t columns) {
    return format(static_cast<Stored>(stored)).tile_bytes(columns);
}

void embedgrad_repack(
    int32_t stored, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* out,
    int32_t threads) {
    run_on_team(threads, [&](const Team& team) {
        const auto [begin, end] = team.share((rows + kTileRows - 1) / kTileRows);
        repack(static_cast<Stored>(stored), blocks, row_bytes, rows, columns, out, begin, end);
    });
}
