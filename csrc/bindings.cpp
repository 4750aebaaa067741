// The torch ops `embedgrad::…`: checks of shapes and types, pointers for the core, torch's thread pool. The fake
// implementations are in embedgrad/backends/native.py; nothing else of the core knows torch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "cpu/isa.h"
#include "cpu/rowwise.h"
#include "cpu/tree_attention.h"

namespace {

using at::Tensor;
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

Rows rows(const Tensor& x, const char* name, int64_t count, int64_t width) {
    check(x, name, at::kFloat, 2);
    TORCH_CHECK(x.size(0) == count && x.size(1) == width, name, " has shape ", x.sizes(), ", expected [", count, ", ", width, "]");
    TORCH_CHECK(x.stride(1) == 1 || width <= 1, name, " must have contiguous rows");
    return {x.data_ptr<float>(), x.stride(0)};
}

const float* vector(const Tensor& x, const char* name, int64_t size) {
    check(x, name, at::kFloat, 1);
    TORCH_CHECK(x.size(0) == size && x.is_contiguous(), name, " must be contiguous with ", size, " elements, not ", x.sizes());
    return x.data_ptr<float>();
}

const int32_t* indices(const Tensor& x, const char* name, int64_t size) {
    check(x, name, at::kInt, 1);
    TORCH_CHECK(x.size(0) == size && x.is_contiguous(), name, " must be contiguous with ", size, " elements, not ", x.sizes());
    return x.data_ptr<int32_t>();
}

Heads heads(const Tensor& x, const char* name, int64_t count, int64_t number, int64_t size) {
    check(x, name, at::kFloat, 3);
    TORCH_CHECK(x.size(0) == count && x.size(1) == number && x.size(2) == size, name, " has shape ", x.sizes(),
                ", expected [", count, ", ", number, ", ", size, "]");
    TORCH_CHECK((x.stride(2) == 1 || size <= 1) && (x.stride(1) == size || number <= 1), name, " must have contiguous rows");
    return {x.data_ptr<float>(), x.stride(0)};
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
    const int64_t n = x.size(0), d = x.size(1);
    embedgrad::rms_norm(pool, rows(x, "x", n, d), Rows{nullptr, 0}, vector(weight, "weight", d), static_cast<float>(eps),
                        rows(out, "out", n, d), n, d);
}

void add_rms_norm(Tensor x, const Tensor& residual, const Tensor& weight, double eps, Tensor out) {
    const int64_t n = x.size(0), d = x.size(1);
    embedgrad::rms_norm(pool, rows(x, "x", n, d), rows(residual, "residual", n, d), vector(weight, "weight", d),
                        static_cast<float>(eps), rows(out, "out", n, d), n, d);
}

void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps, Tensor dx) {
    const int64_t n = x.size(0), d = x.size(1);
    embedgrad::rms_norm_backward(pool, rows(dy, "dy", n, d), rows(x, "x", n, d), vector(weight, "weight", d),
                                 static_cast<float>(eps), rows(dx, "dx", n, d), n, d);
}

using Optional = std::optional<Tensor>;

embedgrad::HeadNorms head_norms(const Optional& q_norm, const Optional& k_norm, int64_t q_heads, int64_t size, double eps) {
    return {q_norm ? vector(*q_norm, "q_norm", size) : nullptr, k_norm ? vector(*k_norm, "k_norm", size) : nullptr, q_heads,
            static_cast<float>(eps)};
}

// The angles' cos or sin, one row per row of x.
const float* angles(const Tensor& x, const char* name, int64_t rows_of_x, int64_t half) {
    const Rows found = rows(x, name, rows_of_x, half);
    TORCH_CHECK(found.row == half || rows_of_x <= 1, name, " must be contiguous");
    return found.data;
}

// x [T, ≥ (h + g)·size], whose first h heads are queries and the next g keys.
Rows rotated(const Tensor& x, int64_t h, int64_t g, int64_t size) {
    TORCH_CHECK(size % 2 == 0 && x.dim() == 2 && (h + g) * size <= x.size(1), "x has no ", h + g, " heads of ", size);
    return rows(x, "x", x.size(0), x.size(1));
}

void rope(
    Tensor x, const Tensor& cos, const Tensor& sin, int64_t h, int64_t g, int64_t size, const Optional& q_norm,
    const Optional& k_norm, double eps) {
    const int64_t n = x.size(0), half = size / 2;
    embedgrad::rope(pool, rotated(x, h, g, size), angles(cos, "cos", n, half), angles(sin, "sin", n, half),
                    head_norms(q_norm, k_norm, h, size, eps), n, h + g, half);
}

void rope_backward(
    Tensor dx, const Optional& raw, const Tensor& cos, const Tensor& sin, int64_t h, int64_t g, int64_t size,
    const Optional& q_norm, const Optional& k_norm, double eps) {
    const int64_t n = dx.size(0), half = size / 2;
    TORCH_CHECK(raw || !(q_norm || k_norm), "the backward of a norm needs the heads before it");
    TORCH_CHECK(!raw || raw->size(0) == n, "raw must have ", n, " rows");
    embedgrad::rope_backward(pool, rotated(dx, h, g, size), raw ? rotated(*raw, h, g, size) : Rows{nullptr, 0},
                             angles(cos, "cos", n, half), angles(sin, "sin", n, half),
                             head_norms(q_norm, k_norm, h, size, eps), n, h + g, half);
}

void swiglu(const Tensor& gate_up, Tensor out) {
    const int64_t n = out.size(0), width = out.size(1);
    embedgrad::swiglu(pool, rows(gate_up, "gate_up", n, 2 * width), rows(out, "out", n, width), n, width);
}

void swiglu_backward(const Tensor& da, const Tensor& gate_up, Tensor out) {
    const int64_t n = da.size(0), width = da.size(1);
    embedgrad::swiglu_backward(pool, rows(da, "da", n, width), rows(gate_up, "gate_up", n, 2 * width),
                               rows(out, "out", n, 2 * width), n, width);
}

const int64_t* longs(const Tensor& x, const char* name, int64_t size) {
    check(x, name, at::kLong, 1);
    TORCH_CHECK(x.size(0) == size && x.is_contiguous(), name, " must be contiguous with ", size, " elements, not ", x.sizes());
    return x.data_ptr<int64_t>();
}

void softmax_loss(Tensor z, const Tensor& targets, const Optional& weights, Tensor nll, Tensor predicted) {
    const int64_t n = z.size(0), vocabulary = z.size(1);
    TORCH_CHECK(vocabulary > 0, "z has no logits");
    const int64_t* wanted = longs(targets, "targets", n);
    for (int64_t t = 0; t < n; ++t)
        TORCH_CHECK_INDEX(wanted[t] < vocabulary, "target ", wanted[t], " of row ", t, " is not below ", vocabulary);
    vector(nll, "nll", n), longs(predicted, "predicted", n);
    embedgrad::softmax_loss(pool, rows(z, "z", n, vocabulary), wanted, weights ? vector(*weights, "weights", n) : nullptr,
                            nll.data_ptr<float>(), predicted.data_ptr<int64_t>(), n, vocabulary);
}

embedgrad::TreeShape tree(
    const Tensor& q, const Tensor& k, const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index,
    const Tensor& block_start, int64_t kept, const Optional& query_position,
    const Optional& key_position, int64_t window, double scale) {
    check(q, "q", at::kFloat, 3);
    check(k, "k", at::kFloat, 3);
    embedgrad::TreeShape t{};
    t.queries = q.size(0), t.keys = k.size(0), t.kept = kept;
    t.heads = q.size(1), t.groups = k.size(1), t.head_dim = q.size(2);
    TORCH_CHECK(t.groups > 0 && t.heads % t.groups == 0, t.heads, " query heads cannot share ", t.groups, " key heads");
    TORCH_CHECK(0 <= kept && kept <= t.keys, "kept is ", kept, ", but there are ", t.keys, " keys");
    t.key_begin = indices(key_begin, "key_begin", t.keys), t.key_end = indices(key_end, "key_end", t.keys);
    t.query_index = indices(query_index, "query_index", t.queries);
    t.block_start = indices(block_start, "block_start", block_start.numel());
    t.blocks = block_start.numel() - 1;
    TORCH_CHECK(t.blocks >= 0 && t.block_start[t.blocks] == t.queries, "block_start must end at ", t.queries);
    for (int64_t b = 0; b < t.blocks; ++b)
        TORCH_CHECK(t.block_start[b] >= 0 && t.block_start[b] < t.block_start[b + 1], "block_start must ascend");
    TORCH_CHECK(query_position.has_value() == key_position.has_value(), "a window needs both positions");
    if (query_position) {
        t.query_position = indices(*query_position, "query_position", t.queries);
        t.key_position = indices(*key_position, "key_position", t.keys);
    }
    t.window = window, t.scale = static_cast<float>(scale);
    return t;
}

float* normaliser(const Tensor& lse, const embedgrad::TreeShape& t) {
    TORCH_CHECK(rows(lse, "lse", t.queries, t.heads).row == t.heads || t.queries <= 1, "lse must be contiguous");
    return lse.data_ptr<float>();
}

void tree_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_begin, const Tensor& key_end,
    const Tensor& query_index, const Tensor& block_start, int64_t kept, const Optional& query_position,
    const Optional& key_position, int64_t window, double scale, Tensor out, Tensor lse) {
    const auto t = tree(q, k, key_begin, key_end, query_index, block_start, kept, query_position, key_position, window, scale);
    embedgrad::tree_attention(
        pool, t, heads(q, "q", t.queries, t.heads, t.head_dim), heads(k, "k", t.keys, t.groups, t.head_dim),
        heads(v, "v", t.keys, t.groups, t.head_dim), heads(out, "out", t.queries, t.heads, t.head_dim),
        normaliser(lse, t));
}

void tree_attention_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& key_begin, const Tensor& key_end, const Tensor& query_index, const Tensor& block_start, int64_t kept,
    const Optional& query_position, const Optional& key_position, int64_t window, double scale,
    Optional dq, Optional dk, Optional dv) {
    const auto t = tree(q, k, key_begin, key_end, query_index, block_start, kept, query_position, key_position, window, scale);
    TORCH_CHECK(dk.has_value() == dv.has_value(), "dk and dv are computed together");
    const Heads none{nullptr, 0};
    embedgrad::tree_attention_backward(
        pool, t, heads(d_out, "do", t.queries, t.heads, t.head_dim), heads(q, "q", t.queries, t.heads, t.head_dim),
        heads(k, "k", t.keys, t.groups, t.head_dim), heads(v, "v", t.keys, t.groups, t.head_dim),
        heads(out, "o", t.queries, t.heads, t.head_dim), normaliser(lse, t),
        dq ? heads(*dq, "dq", t.queries, t.heads, t.head_dim) : none,
        dk ? heads(*dk, "dk", t.keys - t.kept, t.groups, t.head_dim) : none,
        dv ? heads(*dv, "dv", t.keys - t.kept, t.groups, t.head_dim) : none);
}

const char* const kIsaNames[] = {"plain", "avx2", "avx512", "avx512vnni"};

std::string isa() { return kIsaNames[static_cast<int>(embedgrad::isa())]; }

// For tests and benchmarks: another instruction set than the machine's best, until the next call.
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
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
    m.def("add_rms_norm(Tensor(a!) x, Tensor residual, Tensor weight, float eps, Tensor(b!) out) -> ()");
    m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, Tensor(a!) dx) -> ()");
    m.def(
        "rope(Tensor(a!) x, Tensor cos, Tensor sin, int heads, int groups, int head_dim, Tensor? q_norm, "
        "Tensor? k_norm, float eps) -> ()");
    m.def(
        "rope_backward(Tensor(a!) dx, Tensor? raw, Tensor cos, Tensor sin, int heads, int groups, int head_dim, "
        "Tensor? q_norm, Tensor? k_norm, float eps) -> ()");
    m.def("swiglu(Tensor gate_up, Tensor(a!) out) -> ()");
    m.def("swiglu_backward(Tensor da, Tensor gate_up, Tensor(a!) out) -> ()");
    m.def(
        "softmax_loss(Tensor(a!) z, Tensor targets, Tensor? weights, Tensor(b!) nll, Tensor(c!) predicted) -> ()");
    m.def(
        "tree_attention(Tensor q, Tensor k, Tensor v, Tensor key_begin, Tensor key_end, Tensor query_index, "
        "Tensor block_start, int kept, Tensor? query_position, Tensor? key_position, int window, float scale, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def(
        "tree_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor key_begin, "
        "Tensor key_end, Tensor query_index, Tensor block_start, int kept, Tensor? query_position, "
        "Tensor? key_position, int window, float scale, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()");
}

TORCH_LIBRARY_IMPL(embedgrad, CPU, m) {
    m.impl("rms_norm", rms_norm);
    m.impl("add_rms_norm", add_rms_norm);
    m.impl("rms_norm_backward", rms_norm_backward);
    m.impl("rope", rope);
    m.impl("rope_backward", rope_backward);
    m.impl("swiglu", swiglu);
    m.impl("swiglu_backward", swiglu_backward);
    m.impl("softmax_loss", softmax_loss);
    m.impl("tree_attention", tree_attention);
    m.impl("tree_attention_backward", tree_attention_backward);
}
