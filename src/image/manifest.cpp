// See manifest.h.
#include "image/manifest.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <limits>
#include <set>
#include <span>

#include "image/block_hash.h"
#include "image/layout.h"
#include "image/manifest_json.h"
#include "os/file.h"

namespace unmoor {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kFormatName = "unmoor checkpoint";
constexpr Bytes kMaxManifest(uint64_t{64} << 20);
constexpr size_t kMaxTasks = 100'000;
constexpr size_t kMaxVmas = 1'000'000;
constexpr size_t kMaxLayers = 1000;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kMaxPid = uint64_t{1} << 22;

constexpr std::string_view kChecksumHead = "  \"checksum\": \"";
constexpr std::string_view kChecksumTail = "\"\n}\n";
constexpr size_t kChecksumDigits = 32;
constexpr size_t kEndingSize = kChecksumHead.size() + kChecksumDigits + kChecksumTail.size();

// --- Words ---------------------------------------------------------------------------------------

const char* KindName(VmaKind kind) {
  switch (kind) {
    case VmaKind::kMapped:
      return "mapped";
    case VmaKind::kCriu:
      return "criu";
    case VmaKind::kNone:
      return "none";
  }
  return "none";
}

std::optional<VmaKind> KindOf(std::string_view name) {
  for (const VmaKind kind : {VmaKind::kMapped, VmaKind::kCriu, VmaKind::kNone}) {
    if (name == KindName(kind)) return kind;
  }
  return std::nullopt;
}

const char* ImageKindName(ImageKind kind) {
  return kind == ImageKind::kMemory ? "memory" : "process";
}

std::optional<ImageKind> ImageKindOf(std::string_view name) {
  for (const ImageKind kind : {ImageKind::kProcess, ImageKind::kMemory}) {
    if (name == ImageKindName(kind)) return kind;
  }
  return std::nullopt;
}

std::string ProtName(int prot) {
  std::string name = "---";
  if ((prot & PROT_READ) != 0) name[0] = 'r';
  if ((prot & PROT_WRITE) != 0) name[1] = 'w';
  if ((prot & PROT_EXEC) != 0) name[2] = 'x';
  return name;
}

std::optional<int> ProtOf(std::string_view name) {
  for (int prot = 0; prot <= (PROT_READ | PROT_WRITE | PROT_EXEC); ++prot) {
    if (name == ProtName(prot)) return prot;
  }
  return std::nullopt;
}

// The ending of a manifest whose bytes before it are `body`.
std::string Ending(std::string_view body) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(body.data(), body.size()));
  std::string ending(kChecksumHead);
  for (const unsigned char byte : canonical.digest) ending += fmt::format("{:02x}", byte);
  ending += kChecksumTail;
  return ending;
}

// --- Writing -------------------------------------------------------------------------------------

Json ToJson(const ManifestVma& vma) {
  Json json = {{"start", fmt::format("{:#x}", vma.range.begin.value)},
               {"end", fmt::format("{:#x}", vma.range.end.value)},
               {"prot", ProtName(vma.prot)},
               {"flags", vma.flags},
               {"name", vma.name},
               {"kind", KindName(vma.kind)},
               {"data_bytes", vma.data.value}};
  if (vma.kind == VmaKind::kMapped) {
    json["layer"] = vma.layer;
    json["offset"] = vma.offset.value;
  }
  for (const ManifestDelta& delta : vma.deltas) {
    json["deltas"].push_back({{"layer", delta.layer}, {"offset", delta.offset.value}});
  }
  return json;
}

Json ToJson(const ManifestTask& task) {
  Json vmas = Json::array();
  for (const ManifestVma& vma : task.vmas) vmas.push_back(ToJson(vma));
  return {{"vpid", task.vpid},
          {"ppid", task.ppid},
          {"comm", task.comm},
          {"state", task.state},
          {"vmas", std::move(vmas)}};
}

Json ToJson(const ManifestLayer& layer) {
  return {{"id", layer.id},
          {"pages_size", layer.pages_size.value},
          {"data_bytes", layer.data.value},
          {"allocated_bytes", layer.allocated.value},
          {"index_checksum", fmt::format("{:016x}", layer.index_checksum)}};
}

Json ToJson(const ManifestTotals& totals) {
  return {{"tasks", totals.tasks},
          {"vmas", totals.vmas},
          {"mapped_bytes", totals.mapped.value},
          {"layer_data_bytes", totals.layer_data.value},
          {"criu_data_bytes", totals.criu_data.value}};
}

Json ToJson(const Manifest& manifest) {
  Json tasks = Json::array();
  for (const ManifestTask& task : manifest.tasks) tasks.push_back(ToJson(task));
  Json layers = Json::array();
  for (const ManifestLayer& layer : manifest.layers) layers.push_back(ToJson(layer));
  Json json = {{"format", kFormatName},
               {"format_version", kFormatVersion},
               {"checkpoint_id", manifest.checkpoint_id},
               {"parent_id", manifest.parent_id ? Json(*manifest.parent_id) : Json()},
               {"created_unix_ns", manifest.created.value},
               {"tool_version", manifest.tool_version},
               {"criu_version", manifest.criu_version},
               {"kernel_release", manifest.kernel_release},
               {"page_size", manifest.page_size},
               {"cpu_features", manifest.cpu_features},
               {"root_vpid", manifest.root_vpid},
               {"tasks", std::move(tasks)},
               {"layers", std::move(layers)},
               {"totals", ToJson(manifest.Totals())}};
  if (manifest.kind != ImageKind::kProcess) json["kind"] = ImageKindName(manifest.kind);
  if (manifest.written) json["written_bytes"] = manifest.written->value;
  if (manifest.user_data) {
    json["user_data"] = {{"bytes", manifest.user_data->size.value},
                         {"xxh3", fmt::format("{:016x}", manifest.user_data->hash)}};
  }
  return json;
}

// --- Reading -------------------------------------------------------------------------------------

std::vector<std::string> Texts(ParseContext& context, ObjectReader& object, const char* key,
                               size_t limit) {
  std::vector<std::string> texts;
  for (const auto& element : object.Array(key, limit)) {
    if (!element.is_string()) {
      context.Fail(object.Path(key) + " holds something else than strings");
      return {};
    }
    texts.push_back(element.get<std::string>());
  }
  return texts;
}

std::string Id(ObjectReader& object, const char* key) {
  std::string id = object.Text(key);
  if (!IsValidId(id)) object.Fail(key, "is not 32 hexadecimal digits");
  return id;
}

// Members `layer` and `offset`: where the pages of `range` are.
ManifestDelta ReadPlace(ObjectReader& object, const Manifest& manifest, VaddrRange range) {
  ManifestDelta place;
  place.layer = static_cast<uint32_t>(object.Number("layer", kMaxLayers));
  place.offset = FileOffset(object.Number("offset", kMaxLayerSize));
  if (place.layer >= manifest.layers.size()) {
    object.Fail("layer", "names no layer");
    return place;
  }
  if (place.offset.value % kHugePageSize != range.begin.value % kHugePageSize) {
    object.Fail("offset", "does not fit the address modulo 2 MiB");
  }
  const uint64_t size = manifest.layers[place.layer].pages_size.value;
  if (range.end.value > kAddressLimit || place.offset.value > size ||
      range.size().value > size - place.offset.value) {
    object.Fail("offset", "lies beyond the end of the layer");
  }
  return place;
}

void ReadDeltas(ParseContext& context, ObjectReader& object, const Manifest& manifest,
                ManifestVma& vma) {
  // A layer may come twice: what a child shares with its parent, and its own.
  std::set<std::pair<uint32_t, FileOffset>> places = {{vma.layer, vma.offset}};
  for (const auto& element : object.Array("deltas", kMaxDeltas)) {
    if (!context.ok()) return;
    ObjectReader delta(context, element,
                       fmt::format("{}[{}]", object.Path("deltas"), vma.deltas.size()));
    vma.deltas.push_back(ReadPlace(delta, manifest, vma.range));
    const ManifestDelta& last = vma.deltas.back();
    if (!places.insert({last.layer, last.offset}).second) delta.Fail("offset", "came before");
    delta.Close();
  }
  if (vma.deltas.empty()) object.Fail("deltas", "is empty");
}

ManifestVma ReadVma(ParseContext& context, const nlohmann::json& json, std::string where,
                    const Manifest& manifest, Vaddr previous_end) {
  ObjectReader object(context, json, std::move(where));
  ManifestVma vma;
  vma.range = {Vaddr(object.Hex("start", true)), Vaddr(object.Hex("end", true))};
  if (vma.range.empty() || vma.range.begin < previous_end ||
      vma.range.begin.value % kPageSize != 0 || vma.range.end.value % kPageSize != 0) {
    object.Fail("start", "and end are no pages, or out of order");
  }
  const auto prot = ProtOf(object.Text("prot"));
  if (!prot) object.Fail("prot", "is no protection");
  vma.prot = prot.value_or(0);
  vma.flags = Texts(context, object, "flags", 64);
  vma.name = object.Text("name");
  const auto kind = KindOf(object.Text("kind"));
  if (!kind) object.Fail("kind", "is not one this format knows");
  vma.kind = kind.value_or(VmaKind::kNone);
  vma.data = Bytes(object.Number("data_bytes", vma.range.size().value));
  if (vma.kind == VmaKind::kMapped) {
    const ManifestDelta place = ReadPlace(object, manifest, vma.range);
    vma.layer = place.layer;
    vma.offset = place.offset;
    if (object.Has("deltas")) ReadDeltas(context, object, manifest, vma);
  }
  object.Close();
  return vma;
}

ManifestTask ReadTask(ParseContext& context, const nlohmann::json& json, const std::string& where,
                      const Manifest& manifest, size_t vmas_left) {
  ObjectReader object(context, json, where);
  ManifestTask task;
  task.vpid = static_cast<uint32_t>(object.Number("vpid", kMaxPid));
  task.ppid = static_cast<uint32_t>(object.Number("ppid", kMaxPid));
  task.comm = object.Text("comm");
  task.state = object.Text("state");
  if (task.vpid == 0) object.Fail("vpid", "is 0");
  Vaddr previous_end;
  for (const auto& element : object.Array("vmas", vmas_left)) {
    if (!context.ok()) break;
    task.vmas.push_back(ReadVma(context, element,
                                fmt::format("{}.vmas[{}]", where, task.vmas.size()), manifest,
                                previous_end));
    previous_end = task.vmas.back().range.end;
  }
  object.Close();
  return task;
}

ManifestLayer ReadLayer(ParseContext& context, const nlohmann::json& json, std::string where) {
  ObjectReader object(context, json, std::move(where));
  ManifestLayer layer;
  layer.id = Id(object, "id");
  layer.pages_size = Bytes(object.Number("pages_size", kMaxLayerSize));
  layer.data = Bytes(object.Number("data_bytes", layer.pages_size.value));
  layer.allocated = Bytes(object.Number("allocated_bytes", kNoLimit));
  layer.index_checksum = object.Hex("index_checksum", false);
  object.Close();
  return layer;
}

void ReadTasks(ParseContext& context, ObjectReader& object, Manifest& manifest) {
  std::set<uint32_t> vpids;
  size_t vmas_left = kMaxVmas;
  for (const auto& element : object.Array("tasks", kMaxTasks)) {
    if (!context.ok()) return;
    const std::string where = fmt::format("tasks[{}]", manifest.tasks.size());
    manifest.tasks.push_back(ReadTask(context, element, where, manifest, vmas_left));
    vmas_left -= std::min(vmas_left, manifest.tasks.back().vmas.size());
    if (!vpids.insert(manifest.tasks.back().vpid).second) {
      context.Fail(where + ".vpid came before");
    }
  }
  if (!vpids.contains(manifest.root_vpid)) object.Fail("root_vpid", "names no task");
}

void ReadTotals(ParseContext& context, ObjectReader& object, const Manifest& manifest) {
  ObjectReader totals(context, object.Member("totals"), "totals");
  ManifestTotals read;
  read.tasks = totals.Number("tasks", kNoLimit);
  read.vmas = totals.Number("vmas", kNoLimit);
  read.mapped = Bytes(totals.Number("mapped_bytes", kNoLimit));
  read.layer_data = Bytes(totals.Number("layer_data_bytes", kNoLimit));
  read.criu_data = Bytes(totals.Number("criu_data_bytes", kNoLimit));
  totals.Close();
  if (context.ok() && read != manifest.Totals()) context.Fail("totals do not add up");
}

// What an image of memory ranges consists of, and nothing else.
void CheckMemoryImage(ObjectReader& object, const Manifest& manifest) {
  if (manifest.tasks.size() != 1 || manifest.tasks[0].vpid != kMemoryTask) {
    return object.Fail("tasks", "of an image of memory are one, with vpid 1");
  }
  for (const ManifestVma& vma : manifest.tasks[0].vmas) {
    if (vma.kind != VmaKind::kMapped) {
      return object.Fail("tasks[0].vmas", "of an image of memory are all mapped");
    }
  }
}

void ReadOptionalMembers(ParseContext& context, ObjectReader& object, Manifest& manifest) {
  if (object.Has("kind")) {
    const auto kind = ImageKindOf(object.Text("kind"));
    if (!kind) object.Fail("kind", "is not one this format knows");
    manifest.kind = kind.value_or(ImageKind::kProcess);
  }
  if (object.Has("written_bytes")) {
    manifest.written = Bytes(object.Number("written_bytes", kNoLimit));
  }
  if (object.Has("user_data")) {
    ObjectReader data(context, object.Member("user_data"), "user_data");
    manifest.user_data.emplace();
    manifest.user_data->size = Bytes(data.Number("bytes", kMaxUserData.value));
    manifest.user_data->hash = data.Hex("xxh3", false);
    data.Close();
  }
}

void ReadMembers(ParseContext& context, ObjectReader& object, Manifest& manifest) {
  ReadOptionalMembers(context, object, manifest);
  manifest.checkpoint_id = Id(object, "checkpoint_id");
  manifest.parent_id = object.TextOrNull("parent_id");
  if (manifest.parent_id && !IsValidId(*manifest.parent_id)) {
    object.Fail("parent_id", "is not 32 hexadecimal digits");
  }
  manifest.created = Nanos(static_cast<int64_t>(object.Number("created_unix_ns", kNoLimit / 2)));
  manifest.tool_version = object.Text("tool_version");
  manifest.criu_version = object.Text("criu_version");
  manifest.kernel_release = object.Text("kernel_release");
  manifest.page_size = static_cast<uint32_t>(object.Number("page_size", uint64_t{1} << 30));
  if (manifest.page_size != kPageSize) object.Fail("page_size", "is not 4096");
  manifest.cpu_features = Texts(context, object, "cpu_features", 4096);
  if (std::ranges::adjacent_find(manifest.cpu_features, std::greater_equal<>()) !=
      manifest.cpu_features.end()) {
    object.Fail("cpu_features", "are not in order");
  }
  manifest.root_vpid = static_cast<uint32_t>(object.Number("root_vpid", kMaxPid));
  for (const auto& element : object.Array("layers", kMaxLayers)) {
    manifest.layers.push_back(
        ReadLayer(context, element, fmt::format("layers[{}]", manifest.layers.size())));
  }
  ReadTasks(context, object, manifest);
  if (context.ok() && manifest.kind == ImageKind::kMemory) CheckMemoryImage(object, manifest);
  ReadTotals(context, object, manifest);
}

// Format and version come before the checksum: another version may end in another way.
Result<> CheckFormat(const nlohmann::json& json, const std::string& name) {
  const auto format = json.is_object() ? json.find("format") : json.end();
  if (!json.is_object() || format == json.end() || *format != kFormatName) {
    return UserError("{} is not a manifest of unmoor, or it is damaged", name);
  }
  const auto version = json.find("format_version");
  if (version == json.end() || !version->is_number_unsigned()) {
    return UserError("{} is damaged: it has no format_version", name);
  }
  if (*version != kFormatVersion) {
    return Failure(Error(ErrorKind::kUser, EOPNOTSUPP,
                         fmt::format("{}: format version {} is not one this unmoor ({}) reads",
                                     name, version->get<uint64_t>(), kFormatVersion)));
  }
  return {};
}

// Of another machine, not damaged.
Result<> CheckPageSize(const nlohmann::json& json, const std::string& name) {
  const auto size = json.find("page_size");
  if (size == json.end() || !size->is_number_unsigned() || *size == kPageSize) return {};
  return Failure(Error(ErrorKind::kUser, EOPNOTSUPP,
                       fmt::format("{}: made with pages of {} bytes, page_size is not {} here",
                                   name, size->get<uint64_t>(), kPageSize)));
}

Result<> CheckEnding(std::string_view text, const std::string& name) {
  if (text.size() >= kEndingSize) {
    const std::string_view body = text.substr(0, text.size() - kEndingSize);
    if (text.substr(body.size()) == Ending(body)) return {};
  }
  return UserError("{} is damaged: it does not match its checksum; restore it from a copy", name);
}

// --- What a directory is -------------------------------------------------------------------------

Failure NotAnImage(const std::string& dir) {
  const auto info = Stat(dir);
  if (!info) {
    if (info.error().errnum() == ENOENT) return UserError("{} does not exist", dir);
    return Failure(info.error());
  }
  if (!S_ISDIR(info->st_mode)) return UserError("{} is not a directory", dir);
  const auto names = ListDirectory(dir);
  if (!names) return Failure(names.error());
  if (names->empty()) return UserError("{} is empty; it holds no checkpoint", dir);
  if (Exists(dir + "/inventory.img")) {
    return UserError(
        "{} is a stock CRIU image directory; 'unmoor import' makes an image of ours of it, and "
        "'unmoor restore' restores it",
        dir);
  }
  if (Exists(CriuDirectory(dir))) {
    return UserError("{} is missing; the checkpoint is not complete", ManifestPath(dir));
  }
  return UserError("{} holds no checkpoint (no manifest.json in it)", dir);
}

}  // namespace

ManifestTotals Manifest::Totals() const {
  ManifestTotals totals;
  totals.tasks = tasks.size();
  for (const ManifestTask& task : tasks) {
    totals.vmas += task.vmas.size();
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind == VmaKind::kMapped) totals.mapped += vma.range.size();
      if (vma.kind == VmaKind::kCriu) totals.criu_data += vma.data;
    }
  }
  for (const ManifestLayer& layer : layers) totals.layer_data += layer.data;
  return totals;
}

Result<std::string> EncodeManifest(const Manifest& manifest) {
  std::string text = ToJson(manifest).dump(2, ' ', false, Json::error_handler_t::replace);
  // "…\n}" becomes "…,\n" and the checksum's ending.
  text.resize(text.size() - 2);
  text += ",\n";
  text += Ending(text);
  if (auto parsed = ParseManifest(text, "the new manifest"); !parsed) {
    return Failure(std::move(parsed).error());
  }
  return text;
}

Result<Manifest> ParseManifest(const std::string& text, const std::string& name) {
  if (text.size() > kMaxManifest.value) {
    return UserError("{} is larger than the {} a manifest may have", name,
                     HumanBytes(kMaxManifest));
  }
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded()) {
    return UserError("{} is damaged: it is not JSON; restore it from a copy", name);
  }
  UNMOOR_TRY(CheckFormat(json, name));
  UNMOOR_TRY(CheckEnding(text, name));
  UNMOOR_TRY(CheckPageSize(json, name));
  ParseContext context;
  ObjectReader object(context, json, "");
  Manifest manifest;
  for (const char* key : {"format", "format_version", "checksum"}) (void)object.Member(key);
  ReadMembers(context, object, manifest);
  object.Close();
  if (!context.ok()) return UserError("{}: {}", name, context.problem());
  return manifest;
}

Result<> WriteManifest(const std::string& dir, const Manifest& manifest) {
  UNMOOR_ASSIGN(const std::string text, EncodeManifest(manifest));
  const std::string path = ManifestPath(dir);
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_WRONLY | O_CREAT | O_EXCL, 0600));
  return WriteStream(fd.get(), std::as_bytes(std::span(text)), path);
}

Result<Manifest> ReadManifest(const std::string& dir) {
  const std::string path = ManifestPath(dir);
  auto text = ReadRegularFile(path, kMaxManifest);
  if (text) return ParseManifest(*text, path);
  if (!Exists(path)) return NotAnImage(dir);
  return Failure(std::move(text).error());
}

Result<ManifestUserData> WriteUserData(const std::string& dir, std::string_view bytes) {
  if (bytes.size() > kMaxUserData.value) {
    return UserError("{} of user data; an image holds at most {}", HumanBytes(Bytes(bytes.size())),
                     HumanBytes(kMaxUserData));
  }
  const std::string path = UserDataPath(dir);
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_WRONLY | O_CREAT | O_EXCL, 0600));
  UNMOOR_TRY(WriteStream(fd.get(), std::as_bytes(std::span(bytes)), path));
  return ManifestUserData{Bytes(bytes.size()), HashOf(std::as_bytes(std::span(bytes)))};
}

Result<std::string> ReadUserData(const std::string& dir, const ManifestUserData& entry) {
  const std::string path = UserDataPath(dir);
  if (!Exists(path)) return UserError("{} is missing; the image is not complete", path);
  UNMOOR_ASSIGN(std::string bytes, ReadRegularFile(path, kMaxUserData));
  if (bytes.size() != entry.size.value) {
    return UserError("{} {}: it has {} bytes, not {}", path,
                     bytes.size() < entry.size.value ? "is truncated" : "has bytes too many",
                     bytes.size(), entry.size.value);
  }
  if (HashOf(std::as_bytes(std::span(bytes))) != entry.hash) {
    return UserError("{} is damaged: it does not match its hash", path);
  }
  return bytes;
}

}  // namespace unmoor
