// Images of memory: written, opened, mapped; and every kind of bad input.
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <xxhash.h>

#include "image/layout.h"
#include "image/manifest.h"
#include "library/mapped_pieces.h"
#include "library_fixture.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {

std::string ProtectionsOf(const MemoryRange& range) {
  const VaddrRange wanted{Vaddr(reinterpret_cast<uint64_t>(range.begin)),
                          Vaddr(reinterpret_cast<uint64_t>(range.begin) + range.size)};
  std::string found;
  const auto maps = ReadMaps(OwnPid()).value();
  for (const VmaInfo& vma : maps) {
    if (!vma.range.Overlaps(wanted)) continue;
    const std::string one = {(vma.prot & PROT_READ) != 0 ? 'r' : '-',
                             (vma.prot & PROT_WRITE) != 0 ? 'w' : '-',
                             (vma.prot & PROT_EXEC) != 0 ? 'x' : '-', vma.shared ? 's' : 'p'};
    if (!found.ends_with(one)) found += (found.empty() ? "" : " ") + one;
  }
  return found;
}

namespace {

using ::testing::HasSubstr;

StatusOr<ImageReport> WriteImage(const std::string& dir, const std::vector<MemoryRange>& ranges,
                                 const std::string& user_data = "") {
  auto writer = PageImageWriter::Create(dir);
  if (!writer.ok()) return writer.status();
  for (const MemoryRange& range : ranges) {
    if (Status status = writer->Add(range); !status.ok()) return status;
  }
  if (Status status = writer->SetUserData(user_data); !status.ok()) return status;
  return writer->Publish();
}

std::string OnlyLayer(const std::string& dir) {
  return LayerPagesPath(dir, ReadManifest(dir).value().layers.at(0).id);
}

TEST(PageImage, MemoryIsMappedAsItWasWritten) {
  const TemporaryDirectory dir;
  Memory memory(1000);
  memory.Fill(3, 500);
  memory.Fill(900, 1);
  const auto before = memory.Copy();
  const auto report = WriteImage(dir / "1", {memory.range()}, "roots");
  ASSERT_STATUS_OK(report);
  EXPECT_FALSE(report->delta);
  EXPECT_EQ(report->address_bytes, 1000 * kPageSize);
  EXPECT_EQ(report->written_bytes, 501 * kPageSize);
  memory.Unmap();

  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  EXPECT_EQ(image->id(), report->id);
  EXPECT_EQ(image->parent_id(), "");
  EXPECT_EQ(image->user_data(), "roots");
  ASSERT_EQ(image->ranges().size(), 1u);
  EXPECT_EQ(image->ranges()[0].data_bytes, 501 * kPageSize);
  ASSERT_STATUS_OK(image->Verify());

  auto map = DirectMap::Map(*image);
  ASSERT_STATUS_OK(map);
  ASSERT_EQ(map->ranges().size(), 1u);
  EXPECT_EQ(reinterpret_cast<uint64_t>(map->ranges()[0].memory.begin), image->ranges()[0].address);
  EXPECT_EQ(BytesAt(map->ranges()[0].memory), before);
  ASSERT_EQ(PiecesOf(*map).size(), 1u);
  // Writes stay ours.
  static_cast<uint8_t*>(map->ranges()[0].memory.begin)[0] = 99;
  ASSERT_STATUS_OK(image->Verify());
}

TEST(PageImage, ProtectionsAreExact) {
  const TemporaryDirectory dir;
  Memory memory(40);
  memory.Fill(0, 40);
  ::mprotect(memory.page(10), 10 * kPageSize, PROT_READ);
  ::mprotect(memory.page(20), 5 * kPageSize, PROT_READ | PROT_EXEC);
  ::madvise(memory.page(30), 10 * kPageSize, MADV_DONTNEED);
  ::mprotect(memory.page(30), 10 * kPageSize, PROT_NONE);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}));
  EXPECT_EQ(ProtectionsOf(memory.range()), "rw-p r--p r-xp rw-p ---p");
  const MemoryRange range = memory.range();
  memory.Unmap();
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  const auto map = DirectMap::Map(*image);
  ASSERT_STATUS_OK(map);
  EXPECT_EQ(ProtectionsOf(range), "rw-p r--p r-xp rw-p ---p");
}

TEST(PageImage, PagesMayComeFromACallback) {
  const TemporaryDirectory dir;
  auto writer = PageImageWriter::Create(dir / "1");
  ASSERT_STATUS_OK(writer);
  const uint64_t at = 0x7'0000'1000;
  uint64_t next = at;
  const auto source = [&](uint64_t address, void* pages, size_t size) {
    EXPECT_EQ(address, next);
    next = address + size;
    std::memset(pages, 0, size);
    for (size_t i = 0; i < size; i += 2 * kPageSize) {
      const uint64_t word = address + i;
      std::memcpy(static_cast<char*>(pages) + i, &word, sizeof word);
    }
    return Status();
  };
  ASSERT_STATUS_OK(writer->Add(at, 1024 * kPageSize, PROT_READ, source));
  const auto report = writer->Publish();
  ASSERT_STATUS_OK(report);
  EXPECT_EQ(report->written_bytes, 512 * kPageSize);
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  auto map = DirectMap::Map(*image, {.placement = Placement::kAnywhere});
  ASSERT_STATUS_OK(map);
  const MappedRange& range = map->ranges()[0];
  EXPECT_EQ(range.recorded_address, at);
  EXPECT_EQ(reinterpret_cast<uint64_t>(range.memory.begin) % kHugePageSize, at % kHugePageSize);
  EXPECT_EQ(*static_cast<uint64_t*>(map->Find(at + 4 * kPageSize)), at + 4 * kPageSize);
  EXPECT_EQ(*static_cast<uint64_t*>(map->Find(at + 5 * kPageSize)), 0u);
  EXPECT_EQ(map->Find(at + 1024 * kPageSize), nullptr);
  EXPECT_EQ(ProtectionsOf(range.memory), "r--p");
}

TEST(PageImage, AFailingCallbackFailsTheImage) {
  const TemporaryDirectory dir;
  auto writer = PageImageWriter::Create(dir / "1");
  ASSERT_STATUS_OK(writer);
  ASSERT_STATUS_OK(writer->Add(0x10000, kPageSize, PROT_READ, [](uint64_t, void*, size_t) {
    return Status(StatusCode::kTimedOut, "no answer");
  }));
  const auto report = writer->Publish();
  EXPECT_CODE(StatusCode::kTimedOut, report);
  EXPECT_EQ(report.status().message(), "no answer");
  EXPECT_FALSE(Exists(dir / "1"));
}

TEST(PageImage, MemoryIsGivenBackOnlyByTheMap) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  const MemoryRange range = memory.range();
  ASSERT_STATUS_OK(WriteImage(dir / "1", {range}));
  memory.Unmap();
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  {
    auto map = DirectMap::Map(*image);
    ASSERT_STATUS_OK(map);
    ASSERT_STATUS_OK(map->Unmap());
    EXPECT_EQ(ProtectionsOf(range), "");
    EXPECT_TRUE(map->ranges().empty());
  }
  {
    const auto map = DirectMap::Map(*image);
  }
  EXPECT_EQ(ProtectionsOf(range), "");
  {
    auto map = DirectMap::Map(*image);
    ASSERT_STATUS_OK(map);
    map->Release();
  }
  EXPECT_EQ(ProtectionsOf(range), "rw-p");
  ::munmap(range.begin, range.size);
}

// --- Bad input -----------------------------------------------------------------------------------

TEST(BadInput, OverlappingRangesAreRefused) {
  const TemporaryDirectory dir;
  const Memory memory(8);
  auto writer = PageImageWriter::Create(dir / "1");
  ASSERT_STATUS_OK(writer);
  ASSERT_STATUS_OK(writer->Add(memory.part(0, 4)));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add(memory.part(3, 2)));
  const auto source = [](uint64_t, void*, size_t) { return Status(); };
  EXPECT_CODE(StatusCode::kInvalidArgument,
              writer->Add(memory.address() + kPageSize, kPageSize, PROT_READ, source));
  EXPECT_CODE(StatusCode::kInvalidArgument,
              Checkpoint(std::vector{memory.part(0, 4), memory.part(2, 4)}, dir / "2"));
  EXPECT_FALSE(Exists(dir / "2"));
}

TEST(BadInput, UnalignedEmptyAndUnmappedRangesAreRefused) {
  const TemporaryDirectory dir;
  const Memory memory(8);
  auto writer = PageImageWriter::Create(dir / "1");
  ASSERT_STATUS_OK(writer);
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add({memory.page(0) + 8, kPageSize}));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add({memory.page(0), 100}));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add({memory.page(0), 0}));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add({memory.page(4), 8 * kPageSize}));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add({nullptr, ~size_t{4095}}));
  const auto source = [](uint64_t, void*, size_t) { return Status(); };
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add(5, kPageSize, PROT_READ, source));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add(0, kPageSize, 64, source));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add(~uint64_t{4095}, kPageSize, 1, source));
  EXPECT_CODE(StatusCode::kInvalidArgument, writer->Add(kPageSize, kPageSize, 1, nullptr));
}

TEST(BadInput, UnreadablePagesAreAnErrorAndNoSignal) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  ::mprotect(memory.page(5), kPageSize, PROT_NONE);
  const auto hidden = Checkpoint(std::vector{memory.range()}, dir / "1");
  EXPECT_CODE(StatusCode::kInvalidArgument, hidden);
  EXPECT_THAT(hidden.status().message(), HasSubstr("PROT_READ"));
  ::mprotect(memory.page(5), kPageSize, PROT_READ | PROT_WRITE);
  constexpr int kGuardInstall = 102;
  if (::madvise(memory.page(5), kPageSize, kGuardInstall) == 0) {
    EXPECT_CODE(StatusCode::kInvalidArgument, Checkpoint(std::vector{memory.range()}, dir / "1"));
  }
  // A private mapping beyond the end of its file: reading it would be SIGBUS.
  const Fd file = OpenFile(dir / "short", O_RDWR | O_CREAT).value();
  ASSERT_TRUE(Truncate(file.get(), Bytes(kPageSize), "short"));
  void* const beyond = ::mmap(nullptr, 4 * kPageSize, PROT_READ, MAP_PRIVATE, file.get(), 0);
  ASSERT_NE(beyond, MAP_FAILED);
  EXPECT_CODE(StatusCode::kInvalidArgument,
              Checkpoint(std::vector{MemoryRange{beyond, 4 * kPageSize}}, dir / "1"));
  ::munmap(beyond, 4 * kPageSize);
  EXPECT_FALSE(Exists(dir / "1"));
}

TEST(BadInput, SharedMemoryIsRefused) {
  const TemporaryDirectory dir;
  void* const shared =
      ::mmap(nullptr, kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  EXPECT_CODE(StatusCode::kInvalidArgument,
              Checkpoint(std::vector{MemoryRange{shared, kPageSize}}, dir / "1"));
  ::munmap(shared, kPageSize);
}

TEST(BadInput, ExistingDirectoriesAreNotTouched) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}));
  const std::string manifest = ReadFile(ManifestPath(dir / "1")).value();
  const auto again = PageImageWriter::Create(dir / "1");
  EXPECT_CODE(StatusCode::kInvalidArgument, again);
  EXPECT_EQ(again.status().errnum(), EEXIST);
  EXPECT_CODE(StatusCode::kInvalidArgument, Checkpoint(std::vector{memory.range()}, dir / "1"));
  ASSERT_TRUE(MakeDirectory(dir / "full"));
  ASSERT_TRUE(WriteFile(dir / "full/thesis.tex", "x"));
  EXPECT_CODE(StatusCode::kInvalidArgument,
              PageImageWriter::Create(dir / "full", {.sync = true, .replace = true}));
  EXPECT_CODE(StatusCode::kInvalidArgument, PageImageWriter::Create(dir / "no/such/parent"));
  EXPECT_EQ(ReadFile(ManifestPath(dir / "1")).value(), manifest);
  CheckpointOptions options;
  options.replace = true;
  const auto replaced = Checkpoint(std::vector{memory.range()}, dir / "1", options);
  ASSERT_STATUS_OK(replaced);
  EXPECT_EQ(PageImage::Open(dir / "1").value().id(), replaced->id);
}

TEST(BadInput, MissingManifestAndOtherDirectoriesAreNamed) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  EXPECT_CODE(StatusCode::kNotFound, PageImage::Open(dir / "none"));
  EXPECT_CODE(StatusCode::kNotFound, PageImage::Open(dir.path()));
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}));
  ASSERT_TRUE(RemoveFile(ManifestPath(dir / "1")));
  EXPECT_CODE(StatusCode::kNotFound, PageImage::Open(dir / "1"));
}

// Writes the manifest of `dir` anew, changed.
template <class Change>
void ChangeManifest(const std::string& dir, Change change) {
  Manifest manifest = ReadManifest(dir).value();
  change(manifest);
  (void)RemoveFile(ManifestPath(dir));
  ASSERT_TRUE(WriteManifest(dir, manifest));
}

TEST(BadInput, ImagesOfOtherMachinesAreRefused) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}));
  ChangeManifest(dir / "1", [](Manifest& m) { m.cpu_features.push_back("zz_quantum"); });
  const auto opened = PageImage::Open(dir / "1");
  EXPECT_CODE(StatusCode::kUnsupported, opened);
  EXPECT_THAT(opened.status().message(), HasSubstr("zz_quantum"));
  EXPECT_TRUE(PageImage::Open(dir / "1", {.check_cpu = false}).ok());
  ChangeManifest(dir / "1", [](Manifest& m) { m.kind = ImageKind::kProcess; });
  EXPECT_CODE(StatusCode::kUnsupported, PageImage::Open(dir / "1"));
}

// `text` of a manifest with `from` replaced and its checksum made right again.
std::string Reworded(std::string text, const std::string& from, const std::string& to) {
  text.replace(text.find(from), from.size(), to);
  constexpr size_t kEnding = 51;
  const std::string body = text.substr(0, text.size() - kEnding);
  XXH128_canonical_t digest;
  XXH128_canonicalFromHash(&digest, XXH3_128bits(body.data(), body.size()));
  std::string hex;
  for (const unsigned char byte : digest.digest) hex += fmt::format("{:02x}", byte);
  return body + "  \"checksum\": \"" + hex + "\"\n}\n";
}

TEST(BadInput, AnotherPageSizeOrFormatVersionIsNamedSo) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}));
  const std::string path = ManifestPath(dir / "1");
  const std::string text = ReadFile(path).value();
  ASSERT_TRUE(WriteFile(path, Reworded(text, "\"page_size\": 4096", "\"page_size\": 65536")));
  const auto pages = PageImage::Open(dir / "1");
  EXPECT_CODE(StatusCode::kUnsupported, pages);
  EXPECT_THAT(pages.status().message(), HasSubstr("65536"));
  ASSERT_TRUE(WriteFile(path, Reworded(text, "\"format_version\": 1", "\"format_version\": 2")));
  EXPECT_CODE(StatusCode::kUnsupported, PageImage::Open(dir / "1"));
}

TEST(BadInput, DamagedImagesAreRefused) {
  const TemporaryDirectory dir;
  Memory memory(8);
  memory.Fill(0, 8);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {memory.range()}, "roots"));
  const std::string layer = OnlyLayer(dir / "1");
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  const Fd pages = OpenFile(layer, O_RDWR).value();
  const uint64_t size = static_cast<uint64_t>(Stat(layer)->st_size);
  const std::byte other{0x55};
  const FileOffset at(image->ranges()[0].address % kHugePageSize + 5000);
  ASSERT_TRUE(WriteExactlyAt(pages.get(), std::span(&other, 1), at, layer));
  EXPECT_CODE(StatusCode::kDamaged, image->Verify());
  ASSERT_TRUE(Truncate(pages.get(), Bytes(size / 2), layer));
  EXPECT_CODE(StatusCode::kDamaged, PageImage::Open(dir / "1"));
  ASSERT_TRUE(RemoveFile(layer));
  EXPECT_CODE(StatusCode::kDamaged, PageImage::Open(dir / "1"));
  ASSERT_TRUE(WriteFile(UserDataPath(dir / "1"), "Roots"));
  EXPECT_CODE(StatusCode::kDamaged, PageImage::Open(dir / "1"));
  std::string manifest = ReadFile(ManifestPath(dir / "1")).value();
  manifest[manifest.size() / 2] ^= 1;
  ASSERT_TRUE(WriteFile(ManifestPath(dir / "1"), manifest));
  EXPECT_CODE(StatusCode::kDamaged, PageImage::Open(dir / "1"));
}

TEST(BadInput, AnOccupiedAddressIsNamedAndNothingIsMapped) {
  const TemporaryDirectory dir;
  Memory low(8, kTestAddresses + 0x2'0000'0000);
  Memory high(8, kTestAddresses + 0x3'0000'0000);
  low.Fill(0, 8);
  high.Fill(0, 8);
  ASSERT_STATUS_OK(WriteImage(dir / "1", {low.range(), high.range()}));
  const MemoryRange free_range = low.range();
  low.Unmap();
  high.Fill(0, 8, 9);
  const auto there = high.Copy();
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  const auto map = DirectMap::Map(*image);
  EXPECT_CODE(StatusCode::kBusy, map);
  EXPECT_THAT(map.status().message(),
              HasSubstr(fmt::format("{:x}-{:x}", high.address(), high.address() + 8 * kPageSize)));
  EXPECT_THAT(map.status().message(), HasSubstr("anonymous memory"));
  EXPECT_EQ(ProtectionsOf(free_range), "");
  EXPECT_EQ(high.Copy(), there);
  EXPECT_TRUE(DirectMap::Map(*image, {.placement = Placement::kAnywhere}).ok());
}

TEST(BadInput, NoRoomForAddressesIsNamedAndNothingIsMapped) {
  const TemporaryDirectory dir;
  constexpr uint64_t kAt = kTestAddresses + 0x2'0000'0000;
  auto writer = PageImageWriter::Create(dir / "1");
  ASSERT_STATUS_OK(writer);
  const auto zeros = [](uint64_t, void* pages, size_t size) {
    std::memset(pages, 0, size);
    return Status();
  };
  ASSERT_STATUS_OK(writer->Add(kAt, kPageSize, PROT_READ, zeros));
  ASSERT_STATUS_OK(writer->Add(kAt + 0x10000000, uint64_t{256} << 20, PROT_READ, zeros));
  ASSERT_STATUS_OK(writer->Publish());
  const auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers need more addresses than a limit leaves";
#endif
  uint64_t used = 0;
  const auto maps = ReadMaps(OwnPid()).value();
  for (const VmaInfo& vma : maps) used += vma.range.size().value;
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_AS, &before), 0);
  const rlimit small{used + (64 << 20), before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &small), 0);
  const auto map = DirectMap::Map(*image);
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_CODE(StatusCode::kNoMemory, map);
  EXPECT_EQ(ProtectionsOf({reinterpret_cast<void*>(kAt), kPageSize}), "");
  EXPECT_TRUE(DirectMap::Map(*image).ok());
}

TEST(BadInput, AFullFileSystemLeavesNothing) {
  const TemporaryDirectory dir;
  if (::mount("none", dir.path().c_str(), "tmpfs", 0, "size=256k") != 0) {
    GTEST_SKIP() << "cannot mount a tmpfs";
  }
  Memory memory(512);
  memory.Fill(0, 512);
  const auto report = Checkpoint(std::vector{memory.range()}, dir / "1");
  EXPECT_CODE(StatusCode::kSystem, report);
  EXPECT_EQ(report.status().errnum(), ENOSPC);
  EXPECT_TRUE(ListDirectory(dir.path())->empty());
  ASSERT_STATUS_OK(Checkpoint(std::vector{memory.part(0, 8)}, dir / "1"));
  EXPECT_TRUE(PageImage::Open(dir / "1").ok());
  ::umount2(dir.path().c_str(), MNT_DETACH);
}

}  // namespace
}  // namespace unmoor
