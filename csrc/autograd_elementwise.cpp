// Autograd and autocast of the element-wise operators, the spline and the couplings' network. Each
// has a backward operator that takes the gradients of the outputs, then what forward took, then,
// where several gradients can be wanted, which are. A gradient is exact, but has no native
// derivative of its own: that is refused.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace snf {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using One = Tensor;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

struct SmoothLeakyReLU {
  static constexpr const char* name = "smooth_leaky_relu";
};
struct SmoothLeakyReLUInverse {
  static constexpr const char* name = "smooth_leaky_relu_inverse";
  static constexpr bool keeps_output = true;  // in the place of its argument
};
struct Actnorm {
  static constexpr const char* name = "actnorm";
};
struct AffineCoupling {
  static constexpr const char* name = "affine_coupling";
};
struct Logit {
  static constexpr const char* name = "logit";
};
struct NormalLogProb {
  static constexpr const char* name = "normal_log_prob";
};
struct RqSpline {
  static constexpr const char* name = "rq_spline";
};

struct ImageNetwork {
  static constexpr const char* name = "image_network";
};

template <typename Op>
std::string full_name() {
  return std::string("snf_ext::") + Op::name;
}

template <typename Op, typename Outputs, typename... Arguments>
Outputs call(Arguments... arguments) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(full_name<Op>().c_str(), "")
                             .template typed<Outputs(Arguments...)>();
  return op.call(arguments...);
}

template <typename T>
constexpr bool is_tensor = std::is_same_v<std::decay_t<T>, Tensor>;

variable_list as_list(const One& output) { return {output}; }
template <typename... T>
variable_list as_list(const std::tuple<T...>& outputs) {
  return std::apply([](const auto&... t) { return variable_list{t...}; }, outputs);
}

// The backward operator, refusing to be differentiated. tensors: the gradient of the first output,
// that of the second where there is one (`second`: and it is known), then forward's.
template <typename Op>
struct Backward : torch::autograd::Function<Backward<Op>> {
  static variable_list forward(
      AutogradContext*, at::TensorList tensors, std::optional<bool> second,
      const std::vector<c10::IValue>& rest) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow((full_name<Op>() + "_backward").c_str(), "");
    at::AutoDispatchBelowADInplaceOrView below;
    torch::jit::Stack stack(tensors.begin(), tensors.end());
    if (second == false) stack.insert(stack.begin() + 1, c10::IValue());
    stack.insert(stack.end(), rest.begin(), rest.end());
    op.callBoxed(&stack);
    variable_list out;
    for (const c10::IValue& value : stack) out.push_back(value.toTensor());
    return out;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "double backward through ", Op::name,
        " is not supported: its gradient is exact, but has no native second derivative; the plain "
        "torch one does, inside `with snf_ext.use_backend(\"reference\")`");
  }
};

template <typename Op, typename Outputs, typename... Arguments>
struct Forward : torch::autograd::Function<Forward<Op, Outputs, Arguments...>> {
  static constexpr size_t kTensors = (is_tensor<Arguments> + ...);

  static variable_list forward(AutogradContext* ctx, Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list out = as_list(call<Op, Outputs, Arguments...>(arguments...));
    variable_list tensors;
    c10::impl::GenericList rest(c10::AnyType::get());
    const auto keep = [&](const auto& argument) {
      if constexpr (is_tensor<decltype(argument)>)
        tensors.push_back(argument);
      else
        rest.push_back(argument);
    };
    (keep(arguments), ...);
    if constexpr (requires { Op::keeps_output; }) tensors[0] = out[0];
    ctx->save_for_backward(tensors);
    ctx->saved_data["rest"] = rest;
    ctx->saved_data["outputs"] = static_cast<int64_t>(out.size());
    ctx->set_materialize_grads(false);
    if (out.size() == 3) ctx->mark_non_differentiable({out[2]});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    std::vector<c10::IValue> rest = ctx->saved_data["rest"].toListRef().vec();
    if (kTensors > 1) {
      c10::List<bool> mask;
      for (size_t i = 0; i < kTensors; ++i) mask.push_back(ctx->needs_input_grad(i));
      rest.emplace_back(mask);
    }
    const bool only = grads.size() == 1;
    if (only && !grads[0].defined()) return variable_list(sizeof...(Arguments));
    const bool second = !only && grads[1].defined();
    variable_list tensors = {grads[0].defined() ? grads[0] : at::zeros_like(saved[0])};
    if (second) tensors.push_back(grads[1]);
    tensors.insert(tensors.end(), saved.begin(), saved.end());
    const variable_list out = Backward<Op>::apply(
        at::TensorList(tensors), only ? std::nullopt : std::optional<bool>(second), rest);
    variable_list result(sizeof...(Arguments));
    for (size_t i = 0; i < kTensors; ++i)
      if (ctx->needs_input_grad(i)) result[i] = out[i];
    return result;
  }
};

template <typename Op, typename Outputs, typename... Arguments>
Outputs autograd(Arguments... arguments) {
  const variable_list out = Forward<Op, Outputs, Arguments...>::apply(arguments...);
  if constexpr (std::is_same_v<Outputs, One>)
    return out[0];
  else if constexpr (std::is_same_v<Outputs, Two>)
    return {out[0], out[1]};
  else
    return {out[0], out[1], out[2]};
}

// Autocast widens to float32: log-determinants are sums over all elements.
template <at::DeviceType device, typename T>
decltype(auto) widened(const T& argument) {
  if constexpr (is_tensor<T>)
    return at::autocast::cached_cast(at::kFloat, argument, device);
  else
    return T(argument);
}

template <
    at::DeviceType device, c10::DispatchKey key, typename Op, typename Outputs,
    typename... Arguments>
Outputs autocast(Arguments... arguments) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return call<Op, Outputs, Arguments...>(widened<device>(arguments)...);
}

template <typename Op, typename Outputs, typename... Arguments>
void add(torch::Library& m, c10::DispatchKey key) {
  if (key == c10::DispatchKey::Autograd)
    m.impl(Op::name, autograd<Op, Outputs, Arguments...>);
  else if (key == c10::DispatchKey::AutocastCPU)
    m.impl(Op::name, autocast<at::kCPU, c10::DispatchKey::AutocastCPU, Op, Outputs, Arguments...>);
  else
    m.impl(
        Op::name, autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA, Op, Outputs, Arguments...>);
}

void add_all(torch::Library& m, c10::DispatchKey key) {
  add<SmoothLeakyReLU, Two, const Tensor&, double>(m, key);
  add<SmoothLeakyReLUInverse, Three, const Tensor&, double>(m, key);
  add<Actnorm, Two, const Tensor&, const Tensor&, const Tensor&, bool>(m, key);
  add<AffineCoupling, Two, const Tensor&, const Tensor&, bool>(m, key);
  add<Logit, Two, const Tensor&, double, bool>(m, key);
  add<NormalLogProb, One, const Tensor&>(m, key);
  add<RqSpline, Two, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool>(
      m, key);
  add<ImageNetwork, One, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&>(m, key);
}

}  // namespace

TORCH_LIBRARY_IMPL(snf_ext, Autograd, m) { add_all(m, c10::DispatchKey::Autograd); }
TORCH_LIBRARY_IMPL(snf_ext, AutocastCPU, m) { add_all(m, c10::DispatchKey::AutocastCPU); }
TORCH_LIBRARY_IMPL(snf_ext, AutocastCUDA, m) { add_all(m, c10::DispatchKey::AutocastCUDA); }

}  // namespace snf
