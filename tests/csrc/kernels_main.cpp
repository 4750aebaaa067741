// Runs every kernel of a training step on buffers of exactly the size that it needs, with every instruction set that the
// machine has, on one and on three threads, and holds the results against the plain ones. Compiled by
// test_kernel_builds.py under sanitizers: what is read or written beside a buffer, or by two threads at once, ends it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/isa.h"
#include "cpu/prompt_step.h"
#include "cpu/rowwise.h"
#include "cpu/softmax_loss.h"
#include "cpu/tree_attention.h"

using namespace embedgrad;

namespace {

class Threads : public Pool {
public:
    explicit Threads(int64_t count) : count_(count) {}
    int64_t threads() const override { return count_; }
    void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const override {
        const int64_t each = std::max(grain, (n + count_ - 1) / count_);
        std::vector<std::thread> started;
        for (int64_t begin = 0; begin < n; begin += each)
            started.emplace_back([&body, begin, end = std::min(n, begin + each)] { body(begin, end); });
        for (auto& one : started) one.join();
    }

private:
    int64_t count_;
};

uint64_t state = 1;
uint32_t draw() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

template <typename T>
T from(float x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return x;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return {static_cast<uint16_t>(bits >> 16)};
    }
}
double wide(float x) { return x; }
double wide(Bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

// Memory of exactly n numbers, aligned as the arena's: a sanitizer sees the first byte behind it.
template <typename T>
std::unique_ptr<T[], void (*)(T*)> room(int64_t n) {
    T* data = static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
    return {data, [](T* p) { ::operator delete(p, std::align_val_t(64)); }};
}

template <typename T>
struct Numbers {
    int64_t rows, d;
    std::unique_ptr<T[], void (*)(T*)> data;

    Numbers(int64_t r, int64_t width) : rows(r), d(width), data(room<T>(r * width)) {
        for (int64_t i = 0; i < r * width; ++i) data[i] = from<T>(static_cast<float>(draw() % 2001) / 1000.0f - 1.0f);
    }
    Rows<T> all() { return {data.get(), d}; }
    Heads<T> heads() { return {data.get(), d}; }
    void into(std::vector<double>& results) const {
        for (int64_t i = 0; i < rows * d; ++i) results.push_back(wide(data[i]));
    }
};

// A prefix, and branches of these lengths behind it, in depth-first order.
struct Tree {
    std::vector<int32_t> begin, end, index, position, starts{0};
    TreeMask mask{};

    Tree(int32_t prefix, const std::vector<int32_t>& branches, int32_t block, int64_t window) {
        int32_t total = prefix;
        for (int32_t n : branches) total += n;
        for (int32_t i = 0; i < prefix; ++i) begin.push_back(i), end.push_back(total), position.push_back(i);
        for (int32_t n : branches) {
            const int32_t stop = static_cast<int32_t>(begin.size()) + n;
            for (int32_t i = 0; i < n; ++i)
                begin.push_back(stop - n + i), end.push_back(stop), position.push_back(prefix + i);
        }
        for (int32_t i = 0; i < total; ++i) index.push_back(i);
        while (starts.back() < total) starts.push_back(std::min(total, starts.back() + block));
        mask = {total, total, begin.data(), end.data(), index.data(), starts.data(),
                static_cast<int64_t>(starts.size()) - 1, nullptr, nullptr, window};
        if (window) mask.query_position = mask.key_position = position.data();
    }
};

template <typename T>
void attention(const Pool& pool, std::vector<double>& results) {
    for (int64_t window : {0, 9})
        for (int64_t size : {8, 20, 64})
            for (int64_t group : {1, 3}) {
                const Tree tree(21, {5, 40, 1, 17}, 13, window);
                const TreeShape shape{3, 2 * group, 2, size, 0.3f, size == 20 ? 2.0f : 0.0f};
                const int64_t n = tree.mask.keys, rows = 13 * group;
                const auto schedule = tree_schedule(tree.mask);
                if (!fits(tree.mask, schedule.data(), static_cast<int64_t>(schedule.size()))) std::abort();
                Numbers<T> q(n, shape.heads * size), k(n, 2 * size), v(n, 2 * size), out(n, shape.heads * size);
                Numbers<T> d_out(n, shape.heads * size), dq(n, shape.heads * size);
                Numbers<T> dk(n - shape.prefix, 2 * size), dv(n - shape.prefix, 2 * size);
                Numbers<float> lse(n, shape.heads);
                auto memory = room<float>(tree_attention_floats(n, 2, size, rows, pool.threads()));
                tree_attention<T>(pool, tree.mask, schedule.data(), shape, q.heads(), k.heads(), v.heads(), out.heads(),
                                  lse.data.get(), memory.get());
                out.into(results), lse.into(results);
                memory = room<float>(tree_attention_backward_floats(n, 2, size, rows, pool.threads(), true, true));
                tree_attention_backward<T>(pool, tree.mask, schedule.data(), shape, d_out.heads(), q.heads(), k.heads(),
                                           v.heads(), out.heads(), lse.data.get(), dq.heads(), dk.heads(), dv.heads(),
                                           memory.get());
                dq.into(results), dk.into(results), dv.into(results);
            }
}

template <typename T, typename W>
void row_wise(const Pool& pool, int64_t rows, int64_t d, std::vector<double>& results) {
    Numbers<T> x(rows, d), more(rows, d), out(rows, d), dx(rows, d), gate_up(rows, 2 * d), d_gate_up(rows, 2 * d);
    Numbers<W> w(1, d), q_norm(1, 2 * d);
    rms_norm<T>(pool, x.all(), w.data.get(), 1e-6f, out.all(), rows, d);
    rms_norm_backward<T>(pool, more.all(), x.all(), w.data.get(), 1e-6f, dx.all(), rows, d);
    x.into(results), out.into(results), dx.into(results);
    swiglu<T>(pool, gate_up.all(), out.all(), rows, d);
    swiglu_backward<T>(pool, more.all(), gate_up.all(), d_gate_up.all(), rows, d);
    out.into(results), d_gate_up.into(results);
    Numbers<T> heads(rows, 6 * d), raw(rows, 6 * d), cos(rows, d), sin(rows, d);
    const HeadNorms<W> norms = {q_norm.data.get(), nullptr, 2, 1e-6f};
    rope<T>(pool, heads.all(), cos.data.get(), sin.data.get(), norms, rows, 3, d);
    rope_backward<T>(pool, heads.all(), raw.all(), cos.data.get(), sin.data.get(), norms, rows, 3, d);
    heads.into(results);
    Numbers<float> prompt(3, d), grad(3, d);
    std::vector<int64_t> ids, shown;
    for (int64_t i = 0; i < rows; ++i) ids.push_back(draw() % rows), shown.push_back(static_cast<int64_t>(draw() % 4) - 1);
    embed<T, T>(pool, prompt.all(), x.all(), ids.data(), shown.data(), out.all(), rows, d);
    embed_backward<T>(pool, out.all(), shown.data(), grad.all(), rows, 3, d);
    out.into(results), grad.into(results);
}

void the_rest(const Pool& pool, int64_t rows, int64_t d, std::vector<double>& results) {
    Numbers<float> z(rows, d), weights(1, rows), nll(1, rows), e(rows, d), e0(rows, d), m(rows, d), v(rows, d), g(rows, d);
    std::vector<int64_t> targets, predicted(rows);
    for (int64_t i = 0; i < rows; ++i) targets.push_back(draw() % d);
    for (float softcap : {0.0f, 2.0f}) {
        softmax_loss(pool, z.all(), targets.data(), weights.data.get(), nll.data.get(), predicted.data(), rows, d, softcap);
        z.into(results), nll.into(results);
    }
    for (int64_t i = 0; i < rows * d; ++i) v.data[i] = std::abs(v.data[i]);
    for (auto kind : {TrustRegion::cosine, TrustRegion::l2_ball, TrustRegion::mean_cosine}) {
        std::vector<double> similarity(rows), ratio(rows);
        auto projected = room<bool>(rows);
        const TrustRegion region{kind, 0.9, 0.9, 0.9, std::sqrt(0.19), 0, 0.5, 2, 0.3, true, 0x1p-22};
        auto before = room<float>(3 * rows * d);
        double norm = 0;
        bool alive = true;
        const PromptRows prompt{e.all(), e0.all(), m.all(), v.all(), g.all(), before.get(), rows, d};
        prompt_step(pool, {0.1f, 0.999f, 0.001f, 1.0f, 0.01f, 0.1f, 1e-8f}, region, 1.0, prompt,
                    {similarity.data(), ratio.data(), projected.get(), &norm, &alive});
        e.into(results), results.insert(results.end(), similarity.begin(), similarity.end());
    }
}

std::vector<double> everything(int64_t threads) {
    const Threads pool(threads);
    std::vector<double> results;
    state = 1;
    attention<float>(pool, results), attention<Bf16>(pool, results);
    for (int64_t rows : {1, 7, 40})
        for (int64_t d : {1, 5, 16, 67, 640}) {
            row_wise<float, float>(pool, rows, d, results), row_wise<Bf16, Bf16>(pool, rows, d, results);
            row_wise<Bf16, float>(pool, rows, d, results);
            the_rest(pool, rows, d, results);
        }
    return results;
}

}  // namespace

int main() {
    const int sets = static_cast<int>(best_isa()) + 1;
    isa_in_use() = Isa::plain;
    const std::vector<double> plain = everything(1);
    for (int set = 0; set < sets; ++set)
        for (int64_t threads : {1, 3}) {
            isa_in_use() = static_cast<Isa>(set);
            const std::vector<double> found = everything(threads);
            if (found.size() != plain.size()) return std::puts("sizes differ"), 1;
            for (size_t i = 0; i < found.size(); ++i) {
                const double error = std::abs(found[i] - plain[i]) / (1 + std::abs(plain[i]));
                if (!(error <= 0.05)) return std::printf("set %d, %d threads: number %zu differs\n", set, int(threads), i), 1;
            }
        }
    std::printf("%d sets, %zu numbers\n", sets, plain.size());
    return 0;
}
