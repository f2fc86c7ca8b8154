// The TorchScript form of a ranker, run by libtorch.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "request.h"

namespace dashclip {

// Loads a library of operators, such as fbgemm's fbgemm_gpu_tbe_inference.so; throws BadInput.
void load_operators(const std::filesystem::path& library);

class Ranker {
 public:
  // Throws BadInput if the file is no TorchScript, or needs operators that are not loaded.
  explicit Ranker(const std::filesystem::path& model);
  ~Ranker();

  // Returns the probability of a click on each of the C candidates; throws BadInput if the model
  // refuses the request.
  std::vector<float> score(const Request& request);

 private:
  struct Module;  // keeps libtorch's headers, which compile slowly, in one source file
  std::unique_ptr<Module> module_;
};

}  // namespace dashclip
