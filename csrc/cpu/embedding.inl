// Rows and columns of embeddings for one instruction set; see embedding.h.

template <typename T>
static inline void copy_row(const T* from, T* to, int64_t d) {
    std::memcpy(to, from, d * sizeof(T));
}

template <typename From, typename To>
static inline void copy_row(const From* from, To* to, int64_t d) {
    int64_t i = 0;
    for (; i + VL <= d; i += VL) store(to + i, load(from + i));
    if (i < d) store(to + i, load(from + i, d - i), d - i);
}

template <typename Table, typename Out>
static void embed_rows(
    Rows<float> rows, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out, int64_t begin,
    int64_t end, int64_t d) {
    for (int64_t i = begin; i < end; ++i) {
        if (table.data && i + 2 < end && prompt_rows[i + 2] < 0)  // rows of a large table wait for memory
            for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(Table)))
                __builtin_prefetch(table.at(ids[i + 2]) + c);
        if (prompt_rows[i] >= 0)
            copy_row(rows.at(prompt_rows[i]), out.at(i), d);
        else if (table.data)
            copy_row(table.at(ids[i]), out.at(i), d);
    }
}

// Columns [begin, end) of all rows: the first that a row of the prompt gets is copied, others are added.
template <typename T>
static void add_columns(
    Rows<T> dx, const int64_t* prompt_rows, Rows<float> grad, int64_t count, int64_t k, int64_t begin, int64_t end) {
    const int64_t d = end - begin;
    std::vector<uint8_t> has(k);
    for (int64_t i = 0; i < count; ++i) {
        if (prompt_rows[i] < 0) continue;
        const T* from = dx.at(i) + begin;
        float* to = grad.at(prompt_rows[i]) + begin;
        uint8_t& any = has[prompt_rows[i]];
        if (!any) {
            any = 1;
            copy_row(from, to, d);
            continue;
        }
        int64_t c = 0;
        for (; c + VL <= d; c += VL) store(to + c, load(to + c) + load(from + c));
        if (c < d) store(to + c, load(to + c, d - c) + load(from + c, d - c), d - c);
    }
    for (int64_t r = 0; r < k; ++r)
        if (!has[r]) std::memset(grad.at(r) + begin, 0, sizeof(float) * d);
}
