// What `export-ranker` writes, as far as a client without Python reads it.
#pragma once

#include <filesystem>
#include <string>

#include "request.h"

namespace dashclip {

struct ExportedFolder {
  std::filesystem::path model;  // ranker.pt, whose SHA-256 is the manifest's
  InputSpec inputs;
};

// Reads manifest.json and verifies ranker.pt against it; throws BadInput.
ExportedFolder open_exported(const std::filesystem::path& folder);

}  // namespace dashclip
