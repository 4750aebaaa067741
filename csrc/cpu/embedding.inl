// Rows of embeddings for one instruction set; see embedding.h.

// NON_TEMPORAL needs rows of whole cache lines; it has no effect where From and To differ.
template <bool NON_TEMPORAL = false, typename From, typename To>
static inline void copy_row(const From* from, To* to, int64_t d) {
    if constexpr (!std::is_same_v<From, To>) {
        int64_t i = 0;
        for (; i + VL <= d; i += VL) store(to + i, load(from + i));
        if (i < d) store(to + i, load(from + i, d - i), d - i);
    } else if constexpr (NON_TEMPORAL) {
        for (int64_t i = 0; i < d; i += sizeof(Vec) / sizeof(To)) {
            Vec bits;
            std::memcpy(&bits, from + i, sizeof bits);
            stream(reinterpret_cast<float*>(to + i), bits);
        }
    } else {
        std::memcpy(to, from, d * sizeof(To));
    }
}

// How many rows ahead to prefetch, about 4 KiB. The rows are scattered, and each ends before the hardware prefetcher
// has detected a stream.
template <typename T>
EMBEDGRAD_INLINE int64_t rows_ahead(int64_t d) {
    return 1 + 4096 / std::max<int64_t>(1, d * static_cast<int64_t>(sizeof(T)));
}

template <bool NON_TEMPORAL, typename Table, typename Out>
static void embed_rows(
    Rows<float> prompt, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out, int64_t begin,
    int64_t end, int64_t d) {
    const int64_t ahead = rows_ahead<Table>(d);
    for (int64_t i = begin; i < end; ++i) {
        if (table.data && i + ahead < end && prompt_rows[i + ahead] < 0)
            prefetch(table.at(ids[i + ahead]), d * sizeof(Table));
        if (prompt_rows[i] >= 0)
            copy_row<NON_TEMPORAL>(prompt.at(prompt_rows[i]), out.at(i), d);
        else if (table.data)
            copy_row<NON_TEMPORAL>(table.at(ids[i]), out.at(i), d);
    }
    if (NON_TEMPORAL) stream_fence();
}

// Rows [begin, end) of the gradient: row r sums the rows of dx at positions[first[r]] to positions[first[r + 1] − 1].
template <typename T>
static void add_rows(
    Rows<T> dx, const int64_t* first, const int64_t* positions, Rows<float> grad, int64_t begin, int64_t end, int64_t d) {
    const int64_t ahead = rows_ahead<T>(d);
    for (int64_t r = begin; r < end; ++r) {
        float* to = grad.at(r);
        if (first[r] == first[r + 1]) std::memset(to, 0, sizeof(float) * d);
        for (int64_t i = first[r]; i < first[r + 1]; ++i) {
            if (i + ahead < first[end]) prefetch(dx.at(positions[i + ahead]), d * sizeof(T));
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
