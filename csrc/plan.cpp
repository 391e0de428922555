#include "plan.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fastserve {

namespace {

constexpr int64_t kReadWhileWaiting = 128 << 10;  // bytes, well within a second-level cache

// Calls f on every address that an operation reads or writes, in a fixed order.
template <class F> void for_pointers(LinearArgs& a, const F& f) { f(a.x), f(a.out), f(a.residual); }
template <class F> void for_pointers(AttentionArgs& a, const F& f) { f(a.query), f(a.out), f(a.keys), f(a.values); }
template <class F> void for_pointers(NormArgs& a, const F& f) { f(a.x), f(a.out), f(a.weight), f(a.bias), f(a.residual); }
template <class F> void for_pointers(RopeArgs& a, const F& f) { f(a.x), f(a.cos), f(a.sin), f(a.out); }
template <class F> void for_pointers(StoreArgs& a, const F& f) {
    f(a.key), f(a.value), f(a.keys), f(a.values), f(a.slots);
}
template <class F> void for_pointers(HeadsArgs& a, const F& f) {
    f(a.query), f(a.cos), f(a.sin), f(a.positions), f(a.out);
    for_pointers(a.store, f);
}
template <class F> void for_pointers(GatherArgs& a, const F& f) { f(a.table), f(a.ids), f(a.residual), f(a.out); }
template <class F> void for_pointers(ArgmaxArgs& a, const F& f) { f(a.x), f(a.out); }

// The number of rows (tokens or logit rows) of an operation.
int64_t& rows_of(LinearArgs& a) { return a.rows; }
int64_t& rows_of(NormArgs& a) { return a.outer; }
int64_t& rows_of(RopeArgs& a) { return a.tokens; }
int64_t& rows_of(StoreArgs& a) { return a.tokens; }
int64_t& rows_of(HeadsArgs& a) { return a.store.tokens; }
int64_t& rows_of(GatherArgs& a) { return a.rows; }
int64_t& rows_of(ArgmaxArgs& a) { return a.rows; }

struct RunOp {
    const OpTable& table;
    const Worker& worker;
    void operator()(const LinearArgs& a) const { table.linear(a, worker); }
    void operator()(const AttentionArgs& a) const { table.attention(a, worker); }
    void operator()(const NormArgs& a) const { table.norm(a, worker); }
    void operator()(const RopeArgs& a) const { table.rope(a, worker); }
    void operator()(const StoreArgs& a) const { table.store(a, worker); }
    void operator()(const HeadsArgs& a) const { table.heads(a, worker); }
    void operator()(const GatherArgs& a) const {
        a.packed ? look_up(*a.packed, a.ids, a.rows, a.scale, a.out, a.type, worker) : table.gather(a, worker);
    }
    void operator()(const ArgmaxArgs& a) const { table.argmax(a, worker); }
};

struct OpWork {
    int64_t operator()(const LinearArgs& a) const { return a.rows * a.weight->n * a.weight->k / 16; }
    int64_t operator()(const AttentionArgs&) const { return ThreadPool::kMuchWork; }
    int64_t operator()(const NormArgs& a) const { return a.outer * a.inner * a.size; }
    int64_t operator()(const RopeArgs& a) const { return a.tokens * a.heads * a.size; }
    int64_t operator()(const StoreArgs& a) const { return 2 * a.tokens * a.heads * a.size; }
    int64_t operator()(const HeadsArgs& a) const { return a.store.tokens * (a.num_heads + 2 * a.store.heads) * a.store.size; }
    int64_t operator()(const GatherArgs& a) const { return a.rows * a.size; }
    int64_t operator()(const ArgmaxArgs& a) const { return a.rows * a.size; }
};

}  // namespace

ScratchSize op_scratch(const Op& op, int threads) {
    if (const auto* linear = std::get_if<LinearArgs>(&op)) return linear_scratch(*linear);
    if (const auto* attention = std::get_if<AttentionArgs>(&op)) return attention_scratch(*attention);
    if (const auto* heads = std::get_if<HeadsArgs>(&op)) return heads_scratch(*heads);
    if (const auto* gather = std::get_if<GatherArgs>(&op)) {
        return {0, gather->packed ? static_cast<size_t>(gather->size) * 4 : 0};
    }
    if (const auto* argmax = std::get_if<ArgmaxArgs>(&op)) return argmax_scratch(*argmax, threads);
    return {};
}

int64_t op_work(const Op& op) { return std::visit(OpWork{}, op); }

void run_op(const Op& op, const OpTable& table, const Worker& worker) { std::visit(RunOp{table, worker}, op); }

Plan::Plan(const OpTable& table, ThreadPool& pool, int64_t tokens, int64_t rows)
    : table_(table), pool_(pool), probe_tokens_(tokens), probe_rows_(rows) {}

void Plan::tensor(const void* address, int64_t bytes, int64_t count, int input) {
    if (count != probe_tokens_ && count != probe_rows_) {
        throw NotRecordable("it makes a tensor of " + std::to_string(count) + " rows, neither one per token nor per result");
    }
    Tensor made{static_cast<const uint8_t*>(address), bytes, bytes / count, count == probe_tokens_, input};
    if (input >= 0) made.first_use = 0;
    tensors_.push_back(made);
}

void Plan::add(Op op) {
    Entry entry{std::move(op), true, {}};
    std::visit(
        [&](auto& args) {
            if constexpr (std::is_same_v<std::decay_t<decltype(args)>, AttentionArgs>) {
                // Read at each step from its own arrays.
                args.query_starts = args.context_lens = nullptr, args.block_tables = nullptr;
            } else {
                const int64_t rows = rows_of(args);
                if (rows != probe_tokens_ && rows != probe_rows_) {
                    throw NotRecordable("an operation has " + std::to_string(rows) + " rows, neither tokens nor results");
                }
                entry.per_token = rows == probe_tokens_;
            }
            int index = 0;
            for_pointers(args, [&](auto& pointer) {
                Place& where = entry.places[index++] = find(pointer);
                if (where.tensor < 0) return;
                Tensor& tensor = tensors_[where.tensor];
                if (tensor.first_use < 0) tensor.first_use = num_ops();
                tensor.last_use = num_ops();
            });
        },
        entry.op);
    ops_.push_back(std::move(entry));
}

void Plan::finish(const void* logits, const void* chosen) {
    logits_ = find(logits), chosen_ = find(chosen);
    if (logits_.tensor < 0 || chosen_.tensor < 0) throw NotRecordable("its logits are not made by an operation");
    tensors_[logits_.tensor].last_use = tensors_[chosen_.tensor].last_use = num_ops();
    join_norms();
    join_heads();
    share_buffers();
}

// Few rows are normed by each thread for itself, like all that a product needs of its activations: nobody waits then.
void Plan::join_norms() {
    for (int64_t i = 0; i + 1 < num_ops(); ++i) {
        const auto* norm = std::get_if<NormArgs>(&ops_[i].op);
        const auto* linear = std::get_if<LinearArgs>(&ops_[i + 1].op);
        if (!norm || !linear || ops_[i].per_token != ops_[i + 1].per_token) continue;
        const Place &made = ops_[i].places[1], &read = ops_[i + 1].places[0], &residual = ops_[i + 1].places[2];
        if (made.tensor < 0 || made.tensor != read.tensor || made.offset != read.offset || residual.tensor == made.tensor) continue;
        if (norm->inner != 1 || linear->x_stride != norm->size || tensors_[made.tensor].last_use != i + 1) continue;
        ops_[i].joins_next = true;
        largest_norm_ = max_of(largest_norm_, tensors_[made.tensor].row_bytes);
        keep(i, i + 1);  // a thread may write the product while another still reads what is normed
    }
}

// Of few rows, a thread makes whole heads of a merged projection, and the same ones ready for attention.
void Plan::join_heads() {
    for (int64_t i = 0; i + 1 < num_ops(); ++i) {
        const auto* linear = std::get_if<LinearArgs>(&ops_[i].op);
        const auto* heads = std::get_if<HeadsArgs>(&ops_[i + 1].op);
        if (!linear || !heads || !ops_[i].per_token || linear->weight->gated) continue;
        const StoreArgs& store = heads->store;
        const int64_t size = store.size, all = heads->num_heads + 2 * store.heads, row = all * size;
        if (size % kPanelColumns || all % pool_.size() || linear->weight->n != row || linear->out_stride != row) continue;
        const int64_t strides[] = {heads->query_head_stride, store.key_head_stride, store.value_head_stride};
        const int64_t row_strides[] = {heads->query_stride, store.key_stride, store.value_stride};
        const int64_t first[] = {0, heads->num_heads, heads->num_heads + store.heads}, places[] = {0, 5, 6};
        const Place& made = ops_[i].places[1];
        bool fits = made.tensor >= 0;
        for (int part = 0; part < 3; ++part) {
            const Place& read = ops_[i + 1].places[places[part]];
            fits = fits && strides[part] == size && row_strides[part] == row && read.tensor == made.tensor &&
                   read.offset == made.offset + first[part] * size * element_bytes(store.type);
        }
        if (!fits) continue;
        ops_[i].joins_next = true;
        keep(i, i + 1);  // a thread may write heads while another still multiplies
        if (i > 0 && ops_[i - 1].joins_next) keep(i - 1, i + 1);
    }
}

// What an operation reads or writes stays until a later one is done.
void Plan::keep(int64_t op, int64_t until) {
    for (const Place& where : ops_[op].places) {
        if (where.tensor >= 0) tensors_[where.tensor].last_use = max_of(tensors_[where.tensor].last_use, until);
    }
}

Plan::Place Plan::find(const void* address) const {
    for (int64_t i = static_cast<int64_t>(tensors_.size()) - 1; i >= 0 && address; --i) {
        const int64_t offset = static_cast<const uint8_t*>(address) - tensors_[i].address;
        if (offset >= 0 && offset < tensors_[i].bytes) return {i, offset};
    }
    return {};
}

const void* Plan::place(const Place& where) const {
    return slots_[tensors_[where.tensor].buffer].memory.data() + where.offset;
}

// Each tensor takes the first buffer of its shape that nobody reads or writes any more when it is first used.
void Plan::share_buffers() {
    for (Tensor& tensor : tensors_) {
        if (tensor.first_use < 0) continue;
        const bool lasts = tensor.input >= 0;
        auto fits = [&](const Slot& slot) {
            return slot.row_bytes == tensor.row_bytes && slot.per_token == tensor.per_token && slot.free_after < tensor.first_use;
        };
        auto slot = lasts ? slots_.end() : std::find_if(slots_.begin(), slots_.end(), fits);
        if (slot == slots_.end()) slot = slots_.insert(slot, Slot{Buffer(), tensor.row_bytes, tensor.per_token, 0});
        slot->free_after = lasts ? num_ops() : tensor.last_use;
        tensor.buffer = slot - slots_.begin();
    }
}

void Plan::relocate() {
    for (Entry& entry : ops_) {
        std::visit(
            [&](auto& args) {
                int index = 0;
                for_pointers(args, [&](auto& pointer) {
                    const Place& where = entry.places[index++];
                    if (where.tensor < 0) return;
                    pointer = static_cast<std::decay_t<decltype(pointer)>>(const_cast<void*>(place(where)));
                });
            },
            entry.op);
    }
}

int64_t Plan::bytes() const {
    int64_t total = 0;
    for (const Slot& slot : slots_) total += static_cast<int64_t>(slot.memory.bytes());
    return total;
}

void Plan::set_step(const StepInputs& step) {
    if (step.tokens > capacity_tokens_ || step.rows > capacity_rows_) {
        const int64_t tokens = max_of(step.tokens, capacity_tokens_), rows = max_of(step.rows, capacity_rows_);
        capacity_tokens_ = capacity_rows_ = 0;  // should memory run out, the next step moves everything
        for (Slot& slot : slots_) {
            slot.memory.reserve(static_cast<size_t>((slot.per_token ? tokens : rows) * slot.row_bytes));
        }
        relocate();
        capacity_tokens_ = tokens, capacity_rows_ = rows;
    }
    const int64_t* const inputs[kInputs] = {step.input_ids, step.positions, step.slots, step.logit_rows};
    for (const Tensor& tensor : tensors_) {
        if (tensor.input < 0) continue;
        std::memcpy(slots_[tensor.buffer].memory.data(), inputs[tensor.input],
                    static_cast<size_t>((tensor.per_token ? step.tokens : step.rows) * tensor.row_bytes));
    }
    for (Entry& entry : ops_) {
        std::visit(
            [&](auto& args) {
                if constexpr (std::is_same_v<std::decay_t<decltype(args)>, AttentionArgs>) {
                    args.num_sequences = step.num_sequences;
                    args.query_starts = step.query_starts;
                    args.context_lens = args.causal ? step.context_lens : step.source_lens;
                    args.block_tables = args.causal ? step.block_tables : step.source_tables;
                } else {
                    rows_of(args) = entry.per_token ? step.tokens : step.rows;
                    if constexpr (std::is_same_v<std::decay_t<decltype(args)>, LinearArgs>) {
                        const int64_t* slots = entry.per_token ? step.adapter_slots : step.row_adapter_slots;
                        args.adapter_slots = args.adapters ? slots : nullptr;
                    }
                }
            },
            entry.op);
    }
}

void Plan::run_joined(NormArgs norm, LinearArgs linear, const Worker& worker, void* normed) const {
    norm.out = normed;
    linear.x = normed;
    table_.norm(norm, {0, 1, worker.team, worker.shared, worker.scratch, worker.spins});
    table_.linear(linear, worker);
}

// The first of the weights that this thread multiplies next; with few rows that is bound by reading them.
ReadAhead Plan::weights_after(int64_t op, const Worker& worker) const {
    for (int64_t i = op + 1; i < min_of(op + 3, num_ops()); ++i) {
        const auto* linear = std::get_if<LinearArgs>(&ops_[i].op);
        if (!linear || linear->weight->format == Format::sparse) continue;
        const PackedWeight& weight = *linear->weight;
        const int64_t first = share_of(weight.panels, worker.index, worker.count).begin * weight.panel_bytes;
        return {weight.base + first, min_of(kReadWhileWaiting, weight.bytes() - first)};
    }
    return {};
}

void Plan::run(const StepInputs& step, bool choose) {
    set_step(step);
    const int64_t count = num_ops() - (choose ? 0 : 1);
    ScratchSize scratch;
    for (int64_t i = 0; i < count; ++i) {
        const ScratchSize size = op_scratch(ops_[i].op, pool_.size());
        scratch.shared = std::max(scratch.shared, size.shared);
        scratch.per_thread = std::max(scratch.per_thread, size.per_thread);
    }
    const int64_t own = round_up(static_cast<int64_t>(scratch.per_thread), 64);  // then the rows that a thread has normed
    scratch.per_thread = static_cast<size_t>(own + kPrivateRows * largest_norm_);
    pool_.run(scratch, [&](const Worker& worker) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t rows = ops_[i].per_token ? step.tokens : step.rows;
            if (!rows) continue;
            const bool few = rows <= kPrivateRows;
            if (few && ops_[i].joins_next && std::holds_alternative<NormArgs>(ops_[i].op)) {
                run_joined(std::get<NormArgs>(ops_[i].op), std::get<LinearArgs>(ops_[i + 1].op), worker, worker.scratch + own);
                ++i;
            } else {
                run_op(ops_[i].op, table_, worker);
            }
            if (i + 1 < count && !(few && ops_[i].joins_next)) worker.barrier(few ? weights_after(i, worker) : ReadAhead{});
        }
    });
}

}  // namespace fastserve
