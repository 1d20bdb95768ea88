// The operators of PyTorch without Python: what kernels/linear/cpu/ and kernels/token_quant/cpu.py
// define, called by PyTorch's dispatcher itself.
//
// PyTorch's C interface for extensions (torch/csrc/stable/c/shim.h, inductor/aoti_torch/c/shim.h) is
// the same from release to release. It is found at run time in the PyTorch that is loaded, so that
// building needs none. A value on the dispatcher's stack is 64 bits: an integer, or the handle of a
// tensor that the called function owns, or for what may be missing a pointer to such a value, or 0.

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <vector>

#pragma GCC visibility push(default)
#include "mergequant.h"
#pragma GCC visibility pop

namespace {

using Value = uint64_t;
using Handle = void *;
using Boxed = void (*)(Value *, uint64_t, uint64_t);

// The functions that are needed, each returning 0 if it worked.
struct Torch {
    int32_t (*new_library)(const char *, const char *, const char *, uint32_t, Handle *);
    int32_t (*implement)(Handle, const char *, Boxed);
    int32_t (*data)(Handle, void **);
    int32_t (*dimensions)(Handle, int64_t *);
    int32_t (*sizes)(Handle, int64_t **);
    int32_t (*strides)(Handle, int64_t **);
    int32_t (*type)(Handle, int32_t *);
    int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *);
    int32_t (*copy)(Handle, Handle, int32_t);
    int32_t (*remove)(Handle);
    int32_t (*float32)(), (*bfloat16)(), (*float16)(), (*int8)(), (*int32)(), (*cpu)();
};

Torch torch;
int instruction_set = -1;

const char *const NAMES[] = {
    "aoti_torch_library_init_impl", "aoti_torch_library_impl",    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",           "aoti_torch_get_sizes",       "aoti_torch_get_strides",
    "aoti_torch_get_dtype",         "aoti_torch_empty_strided",   "aoti_torch_copy_",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_dtype_float32",     "aoti_torch_dtype_bfloat16",  "aoti_torch_dtype_float16",
    "aoti_torch_dtype_int8",        "aoti_torch_dtype_int32",     "aoti_torch_device_type_cpu",
};
static_assert(sizeof NAMES / sizeof *NAMES == sizeof(Torch) / sizeof(void *), "one name each");

void check(int32_t error, const char *what)
{
    if (error)
        throw std::runtime_error(std::string("mergequant: ") + what);
}

// As native_library.py says it.
void check_call(const char *name, int status)
{
    const char *const whys[] = {"", "the instruction set does not run on this CPU",
                                "an argument is out of range", "there is not enough memory"};
    if (status != MQ_OK)
        throw std::runtime_error(std::string(name) + ": " + whys[status] + ".");
}

// A tensor that this function owns; without a handle there is none.
class Tensor {
  public:
    explicit Tensor(Handle handle = nullptr) : handle(handle) {}
    Tensor(const Tensor &) = delete;
    Tensor(Tensor &&other) noexcept : handle(other.release()) {}
    ~Tensor()
    {
        if (handle)
            torch.remove(handle);
    }

    // The sizes of `like` with `last` as the last one.
    Tensor(const Tensor &like, int64_t last, int32_t type)
    {
        std::vector<int64_t> shape(like.shape(), like.shape() + like.rank());
        shape.back() = last;
        allocate(shape, type);
    }

    Tensor(const std::vector<int64_t> &shape, int32_t type) { allocate(shape, type); }

    Handle release()
    {
        const Handle given = handle;
        handle = nullptr;
        return given;
    }

    template <class Element> Element *data() const
    {
        void *address = nullptr;
        if (handle)
            check(torch.data(handle, &address), "a tensor has no memory");
        return static_cast<Element *>(address);
    }

    void swap(Tensor &other)
    {
        const Handle mine = handle;
        handle = other.handle;
        other.handle = mine;
    }

    // Copied, unless its elements follow one another already; a missing one stays so.
    void make_contiguous()
    {
        if (!handle)
            return;
        const int64_t *const sizes = shape(), *const steps = strides();
        bool follows = true;
        int64_t step = 1;
        for (int64_t i = rank(); i-- > 0;) {
            follows &= sizes[i] == 1 || steps[i] == step;
            step *= sizes[i];
        }
        if (follows)
            return;
        Tensor copy(std::vector<int64_t>(sizes, sizes + rank()), type());
        check(torch.copy(copy.handle, handle, 0), "a tensor cannot be copied");
        swap(copy);
    }

    int64_t rank() const
    {
        int64_t rank;
        check(torch.dimensions(handle, &rank), "a tensor has no sizes");
        return rank;
    }

    const int64_t *shape() const
    {
        int64_t *sizes;
        check(torch.sizes(handle, &sizes), "a tensor has no sizes");
        return sizes;
    }

    const int64_t *strides() const
    {
        int64_t *strides;
        check(torch.strides(handle, &strides), "a tensor has no strides");
        return strides;
    }

    int64_t size(int64_t dimension) const { return shape()[dimension]; }
    int64_t last() const { return shape()[rank() - 1]; }

    int32_t type() const
    {
        int32_t type;
        check(torch.type(handle, &type), "a tensor has no type");
        return type;
    }

  private:
    Handle handle = nullptr;

    void allocate(const std::vector<int64_t> &shape, int32_t type)
    {
        std::vector<int64_t> strides(shape.size());
        int64_t step = 1;
        for (size_t i = shape.size(); i-- > 0;) {
            strides[i] = step;
            step *= shape[i] > 1 ? shape[i] : 1;
        }
        check(torch.empty(int64_t(shape.size()), shape.data(), strides.data(), type, torch.cpu(), 0,
                          &handle),
              "there is no memory for a result");
    }
};

// A tensor's last dimension as rows, copied where they are not contiguous or not evenly apart.
class Rows {
    Tensor x;

  public:
    int64_t count, stride;

    // Takes the tensor from `given`.
    explicit Rows(Tensor &given) : count(1), stride(0)
    {
        if (given.rank() == 0)
            throw std::runtime_error("mergequant: an input has no dimension");
        x.swap(given);
        if (!evenly()) {
            x.make_contiguous();
            evenly();
        }
    }

    const Tensor &tensor() const { return x; }

  private:
    bool evenly()
    {
        const int64_t last = x.rank() - 1, *const shape = x.shape(), *const strides = x.strides();
        count = 1;
        stride = shape[last];
        bool first = true;  // of the dimensions that have more than one entry
        for (int64_t i = last; i-- > 0;) {
            if (shape[i] != 1) {
                if (!first && strides[i] != stride * count)
                    return false;
                stride = first ? strides[i] : stride;
                first = false;
            }
            count *= shape[i];
        }
        return shape[last] == 1 || strides[last] == 1;
    }
};

// Arguments from the dispatcher's stack, in order; all are taken, or their memory would be lost.
class Arguments {
  public:
    explicit Arguments(Value *stack) : next(stack) {}

    Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*next++)); }

    Tensor optional()
    {
        Value *const held = reinterpret_cast<Value *>(*next++);
        if (!held)
            return Tensor();
        const Handle handle = reinterpret_cast<Handle>(*held);
        delete held;
        return Tensor(handle);
    }

    int64_t integer() { return int64_t(*next++); }
    bool boolean() { return (*next++ & 1) != 0; }
    int32_t type() { return int32_t(*next++); }

  private:
    Value *next;
};

Value result(Tensor &tensor) { return reinterpret_cast<Value>(tensor.release()); }

int element_type(int32_t type)
{
    if (type == torch.float32())
        return MQ_FLOAT32;
    if (type == torch.bfloat16())
        return MQ_BFLOAT16;
    if (type == torch.float16())
        return MQ_FLOAT16;
    throw std::runtime_error("mergequant: activations are float32, bfloat16 or float16");
}

// A linear's tensors and widths, as both operators that multiply have them.
struct Linear {
    Tensor weight, step, zero_points, sums, ends;

    explicit Linear(Arguments &from)
        : weight(from.tensor()), step(from.tensor()), zero_points(from.optional()),
          sums(from.optional()), ends(from.optional())
    {
    }

    void multiply(const int8_t *codes, int64_t stride, int64_t m, const float *token_step,
                  const int32_t *token_zero, const float *constant, Tensor &y, int64_t k,
                  int64_t weight_bits, int64_t activation_bits) const
    {
        const int status = mq_linear(
            instruction_set, codes, stride, m, weight.data<uint8_t>(), step.data<float>(),
            zero_points.data<int8_t>(), sums.data<int32_t>(), token_step, token_zero, constant,
            y.data<void>(), element_type(y.type()), step.size(0), k, ends.data<int32_t>(),
            step.size(1), int(weight_bits), int(activation_bits));
        check_call("mq_linear", status);
    }
};

// integer_linear_cpu(codes, weight, weight_step, zero_points, weight_sums, span_ends, token_step,
//                    token_zero, constant, in_features, weight_bits, activation_bits, out_dtype)
void integer_linear(Value *stack, uint64_t, uint64_t)
{
    Arguments from(stack);
    Tensor codes = from.tensor();
    const Linear linear(from);
    Tensor token_step = from.optional(), token_zero = from.optional();
    const Tensor constant = from.optional();
    const int64_t k = from.integer(), weight_bits = from.integer(), bits = from.integer();
    const Rows rows(codes);
    token_step.make_contiguous();
    token_zero.make_contiguous();
    Tensor y(rows.tensor(), linear.step.size(0), from.type());
    if (rows.count)
        linear.multiply(rows.tensor().data<int8_t>(), rows.stride, rows.count, token_step.data<float>(),
                        token_zero.data<int32_t>(), constant.data<float>(), y, k, weight_bits, bits);
    stack[0] = result(y);
}

void quantize(const Rows &rows, const Tensor &clip, int64_t bits, int64_t block,
              int8_t *codes, int64_t columns, float *step, int32_t *zero)
{
    const Tensor &x = rows.tensor();
    const int status = mq_token_quant(instruction_set, x.data<void>(), element_type(x.type()),
                                      rows.stride, rows.count, x.last(), clip.data<float>(),
                                      int(bits), block, codes, columns, step, zero);
    check_call("mq_token_quant", status);
}

// token_quant_native(x, clip, bits, block, columns, zero_points)
void token_quant(Value *stack, uint64_t, uint64_t)
{
    Arguments from(stack);
    Tensor given = from.tensor();
    const Tensor clip = from.tensor();
    const int64_t bits = from.integer(), block = from.integer(), columns = from.integer();
    const bool zero_points = from.boolean();
    const Rows rows(given);
    const Tensor &x = rows.tensor();
    Tensor codes(x, columns, torch.int8()), step(x, 1, torch.float32());
    Tensor zero = zero_points ? Tensor(x, 1, torch.int32())
                              : Tensor(std::vector<int64_t>{0}, torch.int32());
    if (rows.count)
        quantize(rows, clip, bits, block, codes.data<int8_t>(), columns, step.data<float>(),
                 zero_points ? zero.data<int32_t>() : nullptr);
    stack[0] = result(codes);
    stack[1] = result(step);
    stack[2] = result(zero);
}

// token_linear_cpu(x, clip, block, token_zero_points, weight, weight_step, zero_points, weight_sums,
//                  span_ends, constant, in_features, columns, weight_bits, activation_bits, out_dtype)
void token_linear(Value *stack, uint64_t, uint64_t)
{
    Arguments from(stack);
    Tensor given = from.tensor();
    const Tensor clip = from.tensor();
    const int64_t block = from.integer();
    const bool zero_points = from.boolean();
    const Linear linear(from);
    const Tensor constant = from.optional();
    const int64_t k = from.integer(), columns = from.integer();
    const int64_t weight_bits = from.integer(), bits = from.integer();
    const Rows rows(given);
    Tensor y(rows.tensor(), linear.step.size(0), from.type());
    if (rows.count) {
        static thread_local std::vector<int8_t> codes;
        static thread_local std::vector<float> step;
        static thread_local std::vector<int32_t> zero;
        codes.resize(size_t(rows.count * columns));
        step.resize(size_t(rows.count));
        zero.resize(zero_points ? size_t(rows.count) : 0);
        int32_t *const zeros = zero_points ? zero.data() : nullptr;
        quantize(rows, clip, bits, block, codes.data(), columns, step.data(), zeros);
        linear.multiply(codes.data(), columns, rows.count, step.data(), zeros,
                        constant.data<float>(), y, k, weight_bits, bits);
    }
    stack[0] = result(y);
}

}  // namespace

int mq_use_isa(int isa)
{
    if (!mq_isa_runs(isa))
        return MQ_ERROR_ISA;
    instruction_set = isa;
    return MQ_OK;
}

int mq_torch_function_count(void) { return int(sizeof NAMES / sizeof *NAMES); }

const char *mq_torch_function_name(int number)
{
    return number >= 0 && number < mq_torch_function_count() ? NAMES[number] : nullptr;
}

int mq_register_operators(void *const *functions)
{
    if (instruction_set < 0)
        return MQ_ERROR_ISA;
    for (int i = 0; i < mq_torch_function_count(); ++i) {
        if (!functions[i])
            return MQ_ERROR_ARGUMENT;
    }
    memcpy(&torch, functions, sizeof torch);
    static Handle library;  // as long as the process: its end would take the operators back
    if (library)
        return MQ_OK;
    const bool made = !torch.new_library("mergequant", "CPU", __FILE__, __LINE__, &library) &&
                      !torch.implement(library, "integer_linear_cpu", integer_linear) &&
                      !torch.implement(library, "token_quant_native", token_quant) &&
                      !torch.implement(library, "token_linear_cpu", token_linear);
    return made ? MQ_OK : MQ_ERROR_ARGUMENT;
}
