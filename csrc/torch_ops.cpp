// Registers the torch ops `embedgrad::…`. They check shapes and types, and call the core with pointers and torch's
// thread pool. This is the only file that includes torch. Fake implementations are in embedgrad/backends/native.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/isa.h"
#include "cpu/multiply_adds.h"
#include "cpu/prompt_step.h"
#include "cpu/rowwise.h"
#include "cpu/softmax_loss.h"
#include "cpu/tree_attention.h"

namespace {

using at::Tensor;
using embedgrad::Bf16;
using embedgrad::Heads;
using embedgrad::Rows;

class TorchPool : public embedgrad::Pool {
public:
    int64_t threads() const override { return at::get_num_threads(); }
    void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const override {
        at::parallel_for(0, n, grain, body);
    }
};

const TorchPool pool;

void check(const Tensor& x, const char* name, at::ScalarType type, int64_t dim) {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.dim() == dim, name, " must be a CPU tensor of ", type,
                " with ", dim, " dimensions, not ", x.scalar_type(), " ", x.sizes());
}

template <typename T>
constexpr at::ScalarType type_of = std::is_same_v<T, Bf16> ? at::kBFloat16 : at::kFloat;

// Calls run(T{}) with the type in which x is stored.
template <typename Run>
void with_type_of(const Tensor& x, const char* name, const Run& run) {
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
                " must hold float32 or bfloat16, not ", x.scalar_type());
    if (x.scalar_type() == at::kFloat)
        run(float{});
    else
        run(Bf16{});
}

template <typename T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

template <typename T = float>
Rows<T> rows(const Tensor& x, const char* name, int64_t count, int64_t width) {
    check(x, name, type_of<T>, 2);
    TORCH_CHECK(x.size(0) == count && x.size(1) == width, name, " has shape ", x.sizes(), ", expected [", count, ", ", width, "]");
    TORCH_CHECK(x.stride(1) == 1 || width <= 1, name, " must have contiguous rows");
    return {data<T>(x), x.stride(0)};
}

template <typename T>
T* contiguous(const Tensor& x, const char* name, at::ScalarType type, int64_t size) {
    check(x, name, type, 1);
    TORCH_CHECK(x.size(0) == size && x.is_contiguous(), name, " must be contiguous with ", size, " elements, not ",
                x.sizes());
    return data<T>(x);
}

template <typename T = float>
const T* vector(const Tensor& x, const char* name, int64_t size) {
    return contiguous<T>(x, name, type_of<T>, size);
}

const int32_t* indices(const Tensor& x, const char* name, int64_t size) {
    return contiguous<int32_t>(x, name, at::kInt, size);
}

int64_t* longs(const Tensor& x, const char* name, int64_t size) { return contiguous<int64_t>(x, name, at::kLong, size); }

template <typename T>
Heads<T> heads(const Tensor& x, const char* name, int64_t count, int64_t number, int64_t size) {
    check(x, name, type_of<T>, 3);
    TORCH_CHECK(x.size(0) == count && x.size(1) == number && x.size(2) == size, name, " has shape ", x.sizes(),
                ", expected [", count, ", ", number, ", ", size, "]");
    TORCH_CHECK((x.stride(2) == 1 || size <= 1) && (x.stride(1) == size || number <= 1), name, " must have contiguous rows");
    return {data<T>(x), x.stride(0)};
}

using Optional = std::optional<Tensor>;

// Calls run(T, W) for rows of type T and weights of norms of type W: float, or T itself.
template <typename F>
void with_types_of(const Tensor& x, const char* name, const Optional& weight, const F& run) {
    with_type_of(x, name, [&](auto type) {
        if (weight && weight->scalar_type() == at::kFloat)
            run(type, float{});
        else
            run(type, type);
    });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
    with_types_of(x, "x", weight, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        const int64_t n = x.size(0), d = x.size(1);
        embedgrad::rms_norm<T>(pool, rows<T>(x, "x", n, d), vector<W>(weight, "weight", d), static_cast<float>(eps),
                               rows<T>(out, "out", n, d), n, d);
    });
}

void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps, Tensor dx) {
    with_types_of(x, "x", weight, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        const int64_t n = x.size(0), d = x.size(1);
        embedgrad::rms_norm_backward<T>(pool, rows<T>(dy, "dy", n, d), rows<T>(x, "x", n, d),
                                        vector<W>(weight, "weight", d), static_cast<float>(eps), rows<T>(dx, "dx", n, d), n,
                                        d);
    });
}

template <typename W>
embedgrad::HeadNorms<W> head_norms(
    const Optional& q_norm, const Optional& k_norm, int64_t q_heads, int64_t size, double eps) {
    return {q_norm ? vector<W>(*q_norm, "q_norm", size) : nullptr, k_norm ? vector<W>(*k_norm, "k_norm", size) : nullptr,
            q_heads, static_cast<float>(eps)};
}

// cos or sin [rows of x, half].
template <typename T>
const T* angles(const Tensor& x, const char* name, int64_t rows_of_x, int64_t half) {
    const Rows<T> found = rows<T>(x, name, rows_of_x, half);
    TORCH_CHECK(found.stride == half || rows_of_x <= 1, name, " must be contiguous");
    return found.data;
}

// x [T, ≥ (h + g)·size]: first h query heads, then g key heads.
template <typename T>
Rows<T> rotated(const Tensor& x, int64_t h, int64_t g, int64_t size) {
    TORCH_CHECK(size % 2 == 0 && x.dim() == 2 && (h + g) * size <= x.size(1), "x has no ", h + g, " heads of ", size);
    return rows<T>(x, "x", x.size(0), x.size(1));
}

void rope(
    Tensor x, const Tensor& cos, const Tensor& sin, int64_t h, int64_t g, int64_t size, const Optional& q_norm,
    const Optional& k_norm, double eps) {
    with_types_of(x, "x", q_norm ? q_norm : k_norm, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        const int64_t n = x.size(0), half = size / 2;
        embedgrad::rope<T>(pool, rotated<T>(x, h, g, size), angles<T>(cos, "cos", n, half), angles<T>(sin, "sin", n, half),
                           head_norms<W>(q_norm, k_norm, h, size, eps), n, h + g, half);
    });
}

void rope_backward(
    Tensor dx, const Optional& raw, const Tensor& cos, const Tensor& sin, int64_t h, int64_t g, int64_t size,
    const Optional& q_norm, const Optional& k_norm, double eps) {
    with_types_of(dx, "dx", q_norm ? q_norm : k_norm, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        const int64_t n = dx.size(0), half = size / 2;
        TORCH_CHECK(raw || !(q_norm || k_norm), "the backward of a norm needs the heads before it");
        TORCH_CHECK(!raw || raw->size(0) == n, "raw must have ", n, " rows");
        embedgrad::rope_backward<T>(pool, rotated<T>(dx, h, g, size), raw ? rotated<T>(*raw, h, g, size) : Rows<T>{nullptr, 0},
                                    angles<T>(cos, "cos", n, half), angles<T>(sin, "sin", n, half),
                                    head_norms<W>(q_norm, k_norm, h, size, eps), n, h + g, half);
    });
}

void swiglu(const Tensor& gate_up, Tensor out, bool gelu) {
    with_type_of(gate_up, "gate_up", [&](auto type) {
        using T = decltype(type);
        const int64_t n = out.size(0), width = out.size(1);
        embedgrad::swiglu<T>(
            pool, rows<T>(gate_up, "gate_up", n, 2 * width), rows<T>(out, "out", n, width), n, width, gelu);
    });
}

void swiglu_backward(const Tensor& da, const Tensor& gate_up, Tensor out, bool gelu) {
    with_type_of(da, "da", [&](auto type) {
        using T = decltype(type);
        const int64_t n = da.size(0), width = da.size(1);
        embedgrad::swiglu_backward<T>(pool, rows<T>(da, "da", n, width), rows<T>(gate_up, "gate_up", n, 2 * width),
                                      rows<T>(out, "out", n, 2 * width), n, width, gelu);
    });
}

void softmax_loss(
    Tensor z, const Tensor& targets, const Optional& weights, double softcap, Tensor nll, Tensor predicted) {
    const int64_t n = z.size(0), vocabulary = z.size(1);
    TORCH_CHECK(vocabulary > 0, "z has no logits");
    const int64_t* wanted = longs(targets, "targets", n);
    for (int64_t t = 0; t < n; ++t)
        TORCH_CHECK_INDEX(wanted[t] < vocabulary, "target ", wanted[t], " of row ", t, " is not below ", vocabulary);
    embedgrad::softmax_loss(pool, rows(z, "z", n, vocabulary), wanted, weights ? vector(*weights, "weights", n) : nullptr,
                            contiguous<float>(nll, "nll", at::kFloat, n), longs(predicted, "predicted", n), n, vocabulary,
                            static_cast<float>(softcap));
}

// Indices below `limit`; a negative one means "none".
const int64_t* row_indices(const Tensor& x, const char* name, int64_t size, int64_t limit) {
    const int64_t* found = longs(x, name, size);
    for (int64_t i = 0; i < size; ++i)
        TORCH_CHECK_INDEX(found[i] < limit, name, " has ", found[i], " at ", i, ", which is not below ", limit);
    return found;
}

void embed(const Tensor& given, const Optional& table, const Tensor& ids, const Tensor& prompt_rows, Tensor out) {
    const int64_t n = out.size(0), d = out.size(1);
    const Rows<float> prompt = rows(given, "rows", given.size(0), d);
    const int64_t* shown = row_indices(prompt_rows, "prompt_rows", n, given.size(0));
    const int64_t* wanted = longs(ids, "ids", n);
    if (table)
        for (int64_t i = 0; i < n; ++i)
            TORCH_CHECK_INDEX(shown[i] >= 0 || (0 <= wanted[i] && wanted[i] < table->size(0)), "id ", wanted[i], " at ", i,
                              " is no row of a table of ", table->size(0));
    with_type_of(out, "out", [&](auto out_type) {
        using Out = decltype(out_type);
        with_type_of(table ? *table : out, "table", [&](auto type) {
            using Table = decltype(type);
            const Rows<Table> stored = table ? rows<Table>(*table, "table", table->size(0), d) : Rows<Table>{nullptr, 0};
            embedgrad::embed<Table, Out>(pool, prompt, stored, wanted, shown, rows<Out>(out, "out", n, d), n, d);
        });
    });
}

void embed_backward(const Tensor& dx, const Tensor& prompt_rows, Tensor grad) {
    with_type_of(dx, "dx", [&](auto type) {
        using T = decltype(type);
        const int64_t n = dx.size(0), k = grad.size(0), d = grad.size(1);
        embedgrad::embed_backward<T>(pool, rows<T>(dx, "dx", n, d), row_indices(prompt_rows, "prompt_rows", n, k),
                                     rows(grad, "grad", k, d), n, k, d);
    });
}

void prompt_step(
    Tensor e, const Tensor& anchor, Tensor m, Tensor v, const Tensor& g, at::ArrayRef<double> adamw,
    at::ArrayRef<double> region, double limit, Tensor before, Tensor similarity, Tensor norm_ratio, Tensor projected,
    Tensor gradient_norm, Tensor alive) {
    const int64_t k = e.size(0), d = e.size(1);
    TORCH_CHECK(adamw.size() == 7, "AdamW has 7 numbers, not ", adamw.size());
    TORCH_CHECK(region.size() == 11, "a trust region has 11 numbers, not ", region.size());
    const auto of = [&](size_t i) { return static_cast<float>(adamw[i]); };
    for (const Tensor* x : {&similarity, &norm_ratio, &projected}) {
        check(*x, "a report", x == &projected ? at::kBool : at::kDouble, 1);
        TORCH_CHECK(x->size(0) == k && x->is_contiguous(), "a report must be contiguous with ", k, " elements");
    }
    check(gradient_norm, "gradient_norm", at::kDouble, 0), check(alive, "alive", at::kBool, 0);
    check(before, "before", at::kFloat, 3);
    TORCH_CHECK(before.is_contiguous() && before.numel() == 3 * k * d, "before must be contiguous [3, k, d]");
    embedgrad::prompt_step(
        pool, {of(0), of(1), of(2), of(3), of(4), of(5), of(6)},
        {static_cast<embedgrad::TrustRegion::Kind>(static_cast<int64_t>(region[0])), region[1], region[2], region[3],
         region[4], region[5], region[6], region[7], region[8], region[9] != 0, region[10]},
        limit,
        {rows(e, "e", k, d), rows(anchor, "anchor", k, d), rows(m, "m", k, d), rows(v, "v", k, d), rows(g, "g", k, d),
         before.data_ptr<float>(), k, d},
        {similarity.data_ptr<double>(), norm_ratio.data_ptr<double>(), projected.data_ptr<bool>(),
         gradient_norm.data_ptr<double>(), alive.data_ptr<bool>()});
}

embedgrad::TreeMask tree_mask(
    const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index, const Tensor& block_start,
    const Optional& query_position, const Optional& key_position, int64_t window) {
    embedgrad::TreeMask m{};
    m.queries = query_index.numel(), m.keys = key_begin.numel();
    m.key_begin = indices(key_begin, "key_begin", m.keys), m.key_end = indices(key_end, "key_end", m.keys);
    m.query_index = indices(query_index, "query_index", m.queries);
    m.block_start = indices(block_start, "block_start", block_start.numel());
    m.blocks = block_start.numel() - 1;
    TORCH_CHECK(m.blocks >= 0 && m.block_start[m.blocks] == m.queries, "block_start must end at ", m.queries);
    for (int64_t b = 0; b < m.blocks; ++b)
        TORCH_CHECK(m.block_start[b] >= 0 && m.block_start[b] < m.block_start[b + 1], "block_start must ascend");
    TORCH_CHECK(query_position.has_value() == key_position.has_value(), "a window needs both positions");
    if (query_position) {
        m.query_position = indices(*query_position, "query_position", m.queries);
        m.key_position = indices(*key_position, "key_position", m.keys);
    }
    m.window = window;
    return m;
}

Tensor tree_schedule(
    const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index, const Tensor& block_start,
    const Optional& query_position, const Optional& key_position, int64_t window) {
    const std::vector<int32_t> found = embedgrad::tree_schedule(
        tree_mask(key_begin, key_end, query_index, block_start, query_position, key_position, window));
    Tensor schedule = at::empty({static_cast<int64_t>(found.size())}, key_begin.options());
    std::copy(found.begin(), found.end(), schedule.data_ptr<int32_t>());
    return schedule;
}

// What a call of tree attention needs besides q, k, v and their gradients.
struct Tree {
    embedgrad::TreeMask mask;
    embedgrad::TreeShape shape;
    const int32_t* schedule;
    int64_t rows;  // queries · heads per kv head of the largest block
};

Tree tree(
    const Tensor& q, const Tensor& k, const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index,
    const Tensor& block_start, const Tensor& schedule, int64_t prefix, const Optional& query_position,
    const Optional& key_position, int64_t window, double scale, double softcap) {
    TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q and k must have 3 dimensions");
    Tree t{tree_mask(key_begin, key_end, query_index, block_start, query_position, key_position, window), {}, nullptr, 0};
    const int64_t heads = q.size(1), kv_heads = k.size(1);
    t.shape = {prefix, heads, kv_heads, q.size(2), static_cast<float>(scale), static_cast<float>(softcap)};
    TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " key heads");
    TORCH_CHECK(0 <= prefix && prefix <= t.mask.keys, "prefix is ", prefix, ", but there are ", t.mask.keys, " keys");
    t.schedule = indices(schedule, "schedule", schedule.numel());
    TORCH_CHECK(embedgrad::fits(t.mask, t.schedule, schedule.numel()), "the schedule is of another mask");
    for (int64_t b = 0; b < t.mask.blocks; ++b)
        t.rows = std::max<int64_t>(t.rows, (t.mask.block_start[b + 1] - t.mask.block_start[b]) * (heads / kv_heads));
    return t;
}

float* normaliser(const Tensor& lse, const Tree& t) {
    TORCH_CHECK(rows(lse, "lse", t.mask.queries, t.shape.heads).stride == t.shape.heads || t.mask.queries <= 1,
                "lse must be contiguous");
    return lse.data_ptr<float>();
}

constexpr int64_t kFloat = sizeof(float);

int64_t tree_attention_bytes(int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows) {
    return kFloat * embedgrad::tree_attention_floats(keys, kv_heads, head_dim, rows, pool.threads());
}

int64_t tree_attention_backward_bytes(
    int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows, bool wants_dq, bool wants_dkv) {
    return kFloat * embedgrad::tree_attention_backward_floats(
                        keys, kv_heads, head_dim, rows, pool.threads(), wants_dq, wants_dkv);
}

float* workspace(const Tensor& x, int64_t nbytes) {
    check(x, "workspace", at::kByte, 1);
    TORCH_CHECK(x.numel() >= nbytes && x.is_contiguous(), "workspace must have ", nbytes, " bytes, not ", x.numel());
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 64 == 0, "workspace must be aligned to 64 bytes");
    return data<float>(x);
}

void tree_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_begin, const Tensor& key_end,
    const Tensor& query_index, const Tensor& block_start, const Tensor& schedule, int64_t prefix,
    const Optional& query_position, const Optional& key_position, int64_t window, double scale, double softcap, Tensor out,
    Tensor lse, Tensor memory) {
    const Tree t = tree(
        q, k, key_begin, key_end, query_index, block_start, schedule, prefix, query_position, key_position, window, scale,
        softcap);
    const int64_t n = t.mask.queries, s = t.mask.keys, h = t.shape.heads, g = t.shape.kv_heads, size = t.shape.head_dim;
    const int64_t nbytes = tree_attention_bytes(s, g, size, t.rows);
    with_type_of(q, "q", [&](auto type) {
        using T = decltype(type);
        embedgrad::tree_attention<T>(
            pool, t.mask, t.schedule, t.shape, heads<T>(q, "q", n, h, size), heads<T>(k, "k", s, g, size),
            heads<T>(v, "v", s, g, size), heads<T>(out, "out", n, h, size), normaliser(lse, t),
            workspace(memory, nbytes));
    });
}

void tree_attention_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index, const Tensor& block_start,
    const Tensor& schedule, int64_t prefix, const Optional& query_position, const Optional& key_position, int64_t window,
    double scale, double softcap, Optional dq, Optional dk, Optional dv, Tensor memory) {
    const Tree t = tree(
        q, k, key_begin, key_end, query_index, block_start, schedule, prefix, query_position, key_position, window, scale,
        softcap);
    TORCH_CHECK(dk.has_value() == dv.has_value(), "dk and dv are computed together");
    const int64_t n = t.mask.queries, s = t.mask.keys, h = t.shape.heads, g = t.shape.kv_heads, size = t.shape.head_dim;
    const int64_t nbytes = tree_attention_backward_bytes(s, g, size, t.rows, dq.has_value(), dk.has_value());
    with_type_of(q, "q", [&](auto type) {
        using T = decltype(type);
        const Heads<T> none{nullptr, 0};
        embedgrad::tree_attention_backward<T>(
            pool, t.mask, t.schedule, t.shape, heads<T>(d_out, "do", n, h, size), heads<T>(q, "q", n, h, size),
            heads<T>(k, "k", s, g, size), heads<T>(v, "v", s, g, size), heads<T>(out, "o", n, h, size), normaliser(lse, t),
            dq ? heads<T>(*dq, "dq", n, h, size) : none, dk ? heads<T>(*dk, "dk", s - prefix, g, size) : none,
            dv ? heads<T>(*dv, "dv", s - prefix, g, size) : none, workspace(memory, nbytes));
    });
}

int64_t multiply_adds(int64_t rounds) { return embedgrad::multiply_adds(pool, rounds); }

const char* const kIsaNames[] = {"plain", "avx2", "avx512", "avx512vnni"};

std::string isa() { return kIsaNames[static_cast<int>(embedgrad::isa())]; }

// Selects an instruction set until the next call; for tests and benchmarks.
void use_isa(std::string name) {
    for (int i = 0; i <= static_cast<int>(embedgrad::best_isa()); ++i)
        if (name == kIsaNames[i]) {
            embedgrad::isa_in_use() = static_cast<embedgrad::Isa>(i);
            return;
        }
    TORCH_CHECK_VALUE(false, "this machine has no instruction set called ", name);
}

}  // namespace

TORCH_LIBRARY(embedgrad, m) {
    m.def("isa() -> str", isa);
    m.def("use_isa(str name) -> ()", use_isa);
    m.def("multiply_adds(int rounds) -> int", multiply_adds);
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
    m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, Tensor(a!) dx) -> ()");
    m.def(
        "rope(Tensor(a!) x, Tensor cos, Tensor sin, int heads, int kv_heads, int head_dim, Tensor? q_norm, "
        "Tensor? k_norm, float eps) -> ()");
    m.def(
        "rope_backward(Tensor(a!) dx, Tensor? raw, Tensor cos, Tensor sin, int heads, int kv_heads, int head_dim, "
        "Tensor? q_norm, Tensor? k_norm, float eps) -> ()");
    m.def("swiglu(Tensor gate_up, Tensor(a!) out, bool gelu) -> ()");
    m.def("swiglu_backward(Tensor da, Tensor gate_up, Tensor(a!) out, bool gelu) -> ()");
    m.def(
        "softmax_loss(Tensor(a!) z, Tensor targets, Tensor? weights, float softcap, Tensor(b!) nll, "
        "Tensor(c!) predicted) -> ()");
    m.def("embed(Tensor rows, Tensor? table, Tensor ids, Tensor prompt_rows, Tensor(a!) out) -> ()");
    m.def("embed_backward(Tensor dx, Tensor prompt_rows, Tensor(a!) grad) -> ()");
    m.def(
        "prompt_step(Tensor(a!) e, Tensor anchor, Tensor(b!) m, Tensor(c!) v, Tensor g, float[] adamw, "
        "float[] region, float limit, Tensor(d!) before, Tensor(e!) similarity, Tensor(f!) norm_ratio, "
        "Tensor(g!) projected, Tensor(h!) gradient_norm, Tensor(i!) alive) -> ()");
    m.def(
        "tree_schedule(Tensor key_begin, Tensor key_end, Tensor query_index, Tensor block_start, "
        "Tensor? query_position, Tensor? key_position, int window) -> Tensor");
    m.def("tree_attention_bytes(int keys, int kv_heads, int head_dim, int rows) -> int", tree_attention_bytes);
    m.def(
        "tree_attention_backward_bytes(int keys, int kv_heads, int head_dim, int rows, bool wants_dq, bool wants_dkv) -> int",
        tree_attention_backward_bytes);
    m.def(
        "tree_attention(Tensor q, Tensor k, Tensor v, Tensor key_begin, Tensor key_end, Tensor query_index, "
        "Tensor block_start, Tensor schedule, int prefix, Tensor? query_position, Tensor? key_position, int window, "
        "float scale, float softcap, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) workspace) -> ()");
    m.def(
        "tree_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor key_begin, "
        "Tensor key_end, Tensor query_index, Tensor block_start, Tensor schedule, int prefix, Tensor? query_position, "
        "Tensor? key_position, int window, float scale, float softcap, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
        "Tensor(d!) workspace) -> ()");
}

TORCH_LIBRARY_IMPL(embedgrad, CPU, m) {
    m.impl("rms_norm", rms_norm);
    m.impl("rms_norm_backward", rms_norm_backward);
    m.impl("rope", rope);
    m.impl("rope_backward", rope_backward);
    m.impl("swiglu", swiglu);
    m.impl("swiglu_backward", swiglu_backward);
    m.impl("softmax_loss", softmax_loss);
    m.impl("embed", embed);
    m.impl("embed_backward", embed_backward);
    m.impl("prompt_step", prompt_step);
    m.impl("tree_schedule", tree_schedule);
    m.impl("tree_attention", tree_attention);
    m.impl("tree_attention_backward", tree_attention_backward);
}
