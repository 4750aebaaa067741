#include "api.h"

#include <algorithm>
#include <cstring>
#include <optional>
#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#endif

namespace {

using namespace embedgrad;

constexpr int64_t kPiece = 256;  // tokens computed together: enough for the products, few enough for the cache

// `work(crew)` on `threads` threads: those of the OpenMP pool where there is one, so that torch's are not joined by
// others; otherwise on threads of its own.
template <class Work>
void together(int32_t threads, const Work& work) {
#if defined(_OPENMP)
    std::optional<Meeting> meeting;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        meeting.emplace(omp_get_num_threads());
        work(Crew{omp_get_thread_num(), omp_get_num_threads(), &*meeting});
    }
#else
    Meeting meeting(threads);
    std::vector<std::thread> others;
    for (int32_t rank = 1; rank < threads; ++rank)
        others.emplace_back([&, rank] { work(Crew{rank, threads, &meeting}); });
    work(Crew{0, threads, &meeting});
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace

void* embedgrad_decoder_create(const DecoderSpec* spec) { return new Decoder(*spec); }

void embedgrad_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

int32_t embedgrad_generate(void* decoder, Loop* loop, int32_t threads) {
    const SamplingError wrong = check_call(loop->params, loop->sampling);
    if (wrong != kCallIsFine) return -1 - wrong;
    auto& model = *static_cast<Decoder*>(decoder);
    model.reserve(loop->advance.rows);
    LoopEnd end = kGoOn;
    together(threads, [&](const Crew& crew) { run_loop(crew, model, *loop, &end); });
    return end;
}

void embedgrad_decoder_advance(
    void* decoder, const Cache* cache, const Tokens* tokens, const Wanted* wanted, int32_t threads) {
    auto& model = *static_cast<Decoder*>(decoder);
    model.reserve(std::min(tokens->rows, kPiece));
    std::vector<int32_t> rows, target;
    for (int64_t from = 0; from < tokens->rows; from += kPiece) {
        const int64_t count = std::min(kPiece, tokens->rows - from);
        rows.clear(), target.clear();
        for (int64_t i = 0; i < wanted->count; ++i)
            if (const int64_t row = wanted->rows[i] - from; 0 <= row && row < count) {
                rows.push_back(static_cast<int32_t>(row));
                target.push_back(wanted->target[i]);
            }
        const Tokens piece = {
            count, tokens->slots + from, tokens->positions + from, tokens->ids ? tokens->ids + from : nullptr,
            tokens->embeddings ? tokens->embeddings + from * model.spec().hidden : nullptr};
        const Wanted found = {static_cast<int64_t>(rows.size()), rows.data(), target.data(), wanted->logits};
        together(threads, [&](const Crew& crew) { model.advance(crew, *cache, piece, found); });
    }
}

void embedgrad_linear(const Matrix* matrix, const float* x, int64_t rows, float* y, int32_t threads) {
    Activations activations(rows, matrix->columns);
    std::memcpy(activations.row(0), x, sizeof(float) * rows * matrix->columns);
    for (int64_t b = 0; b < rows; ++b) activations.quantise(b, orders(*matrix, rows));
    together(threads, [&](const Crew& crew) {
        const auto [begin, end] = crew.share(matrix->rows, 8);
        linear(*matrix, activations, rows, nullptr, y, matrix->rows, false, begin, end);
    });
}

void embedgrad_widen(const Matrix* matrix, int64_t begin, int64_t end, float* out, int32_t threads) {
    together(threads, [&](const Crew& crew) {
        const auto share = crew.share(end - begin);
        for (int64_t i = share.begin; i < share.end; ++i) read_row(*matrix, begin + i, out + i * matrix->columns);
    });
}
