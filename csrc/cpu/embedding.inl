// Rows of embeddings for one instruction set; see embedding.h.

template <typename From, typename To>
static inline void copy_row(const From* from, To* to, int64_t d) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, d * sizeof(To));
    } else {
        int64_t i = 0;
        for (; i + VL <= d; i += VL) store(to + i, load(from + i));
        if (i < d) store(to + i, load(from + i, d - i), d - i);
    }
}

// Rows stand here and there, and end before the processor has seen that they are streams: what comes next is asked for.
template <typename T>
EMBEDGRAD_INLINE void fetch_row(const T* row, int64_t d) {
    for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

constexpr int64_t kFetched = 4096;  // bytes that are asked for ahead

template <typename Table, typename Out>
static void embed_rows(
    Rows<float> rows, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out, int64_t begin,
    int64_t end, int64_t d) {
    const int64_t ahead = 1 + kFetched / std::max<int64_t>(1, d * static_cast<int64_t>(sizeof(Table)));
    for (int64_t i = begin; i < end; ++i) {
        if (table.data && i + ahead < end && prompt_rows[i + ahead] < 0) fetch_row(table.at(ids[i + ahead]), d);
        if (prompt_rows[i] >= 0)
            copy_row(rows.at(prompt_rows[i]), out.at(i), d);
        else if (table.data)
            copy_row(table.at(ids[i]), out.at(i), d);
    }
}

// The same, where a row of the table is a row of `out` bit by bit and goes past the caches.
template <typename T>
static void embed_rows_past_caches(
    Rows<float> rows, Rows<T> table, const int64_t* ids, const int64_t* prompt_rows, Rows<T> out, int64_t begin, int64_t end,
    int64_t d) {
    constexpr int64_t step = sizeof(Vec) / sizeof(T);
    const int64_t ahead = 1 + kFetched / std::max<int64_t>(1, d * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = begin; i < end; ++i) {
        if (i + ahead < end && prompt_rows[i + ahead] < 0) fetch_row(table.at(ids[i + ahead]), d);
        if (prompt_rows[i] >= 0) {
            copy_row(rows.at(prompt_rows[i]), out.at(i), d);
            continue;
        }
        const T* from = table.at(ids[i]);
        for (int64_t c = 0; c < d; c += step) {
            Vec bits;
            std::memcpy(&bits, from + c, sizeof bits);
            stream(reinterpret_cast<float*>(out.at(i) + c), bits);
        }
    }
    streamed();
}

// Row r of the gradient: the rows of dx at the positions from first[r] on, added up in this order.
template <typename T>
static void add_rows(
    Rows<T> dx, const int64_t* first, const int64_t* positions, Rows<float> grad, int64_t begin, int64_t end, int64_t d) {
    for (int64_t r = begin; r < end; ++r) {
        float* to = grad.at(r);
        if (first[r] == first[r + 1]) std::memset(to, 0, sizeof(float) * d);
        for (int64_t i = first[r]; i < first[r + 1]; ++i) {
            if (i + 2 < first[end]) fetch_row(dx.at(positions[i + 2]), d);
            const T* from = dx.at(positions[i]);
            if (i == first[r]) {
                copy_row(from, to, d);
                continue;
            }
            int64_t c = 0;
            for (; c + VL <= d; c += VL) store(to + c, load(to + c) + load(from + c));
            if (c < d) store(to + c, load(to + c, d - c) + load(from + c, d - c), d - c);
        }
    }
}
