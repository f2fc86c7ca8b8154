#include "ranker.h"

#include <dlfcn.h>

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include "bad_input.h"

namespace dashclip {
namespace {

using Strings = c10::List<std::optional<std::string>>;

// libtorch's messages carry a trace after the line that says what is wrong.
std::string reason(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  std::string text = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  text.erase(0, text.find_first_not_of(" \n"));
  text.erase(std::min(text.find('\n'), text.size()));
  text.erase(text.find_last_not_of(" .:") + 1);
  return text;
}

// A tensor over `values`, which must outlive it.
template <typename T>
at::Tensor view(const std::vector<T>& values) {
  return at::from_blob(const_cast<T*>(values.data()), {static_cast<std::int64_t>(values.size())},
                       c10::CppTypeToScalarType<T>::value);
}

template <typename T>
c10::Dict<std::string, at::Tensor> views(const std::map<std::string, std::vector<T>>& columns) {
  c10::Dict<std::string, at::Tensor> tensors;
  for (const auto& [name, values] : columns) tensors.insert(name, view(values));
  return tensors;
}

c10::Dict<std::string, Strings> lists(
    const std::map<std::string, std::vector<std::optional<std::string>>>& columns) {
  c10::Dict<std::string, Strings> dict;
  for (const auto& [name, texts] : columns) {
    Strings list;
    list.reserve(texts.size());
    for (const auto& text : texts) list.push_back(text);
    dict.insert(name, std::move(list));
  }
  return dict;
}

}  // namespace

void load_operators(const std::filesystem::path& library) {
  // Operators register themselves when their library is loaded. It finds libtorch, which this
  // program has loaded, by name, and its other libraries beside itself.
  if (dlopen(std::filesystem::absolute(library).c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw BadInput(std::string("--operators: ") + dlerror());
  }
}

struct Ranker::Module {
  torch::jit::Module module;
};

Ranker::Ranker(const std::filesystem::path& model) {
  at::set_num_threads(1);
  at::set_num_interop_threads(1);
  c10::InferenceMode guard;
  try {
    module_ = std::make_unique<Module>(Module{torch::jit::load(model.string(), at::kCPU)});
  } catch (const std::exception& error) {
    const std::string why = reason(error);
    const bool operators = why.find("Unknown builtin op") != std::string::npos;
    throw BadInput(model.string() + ": cannot be loaded: " + why +
                   (operators ? " (--operators gives the libraries that hold them)" : ""));
  }
}

Ranker::~Ranker() = default;

std::vector<float> Ranker::score(const Request& request) {
  c10::InferenceMode guard;
  // Else libtorch compiles anew for shapes that it has not met, in the middle of a request.
  torch::jit::GraphOptimizerEnabledGuard no_specialising(false);
  const std::vector<std::int64_t> lengths{static_cast<std::int64_t>(request.products.size())};
  const std::vector<std::int64_t> purchases{static_cast<std::int64_t>(request.history.size())};
  at::Tensor probabilities;
  try {
    probabilities = module_->module
                        .forward({c10::List<std::string>({request.query}), view(lengths),
                                  view(request.products), view(request.history),
                                  view(request.history_age), view(purchases), views(request.ids),
                                  lists(request.strings), views(request.values)})
                        .toTensor()
                        .contiguous();
  } catch (const std::exception& error) {
    throw BadInput("the model refuses the request: " + reason(error));
  }
  const float* first = probabilities.const_data_ptr<float>();
  return {first, first + probabilities.numel()};
}

}  // namespace dashclip
